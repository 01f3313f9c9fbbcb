"""An interpreter of pickles that knows plain data only: it imports nothing, and calls only what its reader gives it.

Python's and torch's own unpicklers check which names a file calls. This one has no way to call them: a name is a
`Name`, and what it makes is what the reader's table says. What is made has bounds, see `Limits`.
"""

import pickle
import pickletools
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

#: What a file's content may take, in multiples of the file's size: several tensors may view one storage.
TIMES = 16
#: Opcodes of a pickle, and items of its content, where one that is held twice counts twice. A checkpoint of a thousand
#: tensors and their optimizer has about 100,000.
MOST = 5_000_000
DEEPEST = 100  #: containers in containers
#: Types of keys, and of parts of a tuple that is one. A deep tuple's hash would overflow the stack.
KEYS = (str, int, float, bool, bytes, type(None))


class Broken(pickle.UnpicklingError):
    """A pickle is damaged, or holds more than plain data."""


@dataclass(frozen=True)
class Name:
    """What a pickle would import, by its full name."""

    full: str


class StandIn(list):
    """Stands in for an unwanted object: always empty, whatever it is given."""

    __hash__ = object.__hash__  # type: ignore[assignment]  # it may be a key; a list's is None


class Limits:
    """Counts the bytes that a file's content takes, and refuses what is far larger than the file."""

    def __init__(self, size: int):
        self.left = TIMES * size + 2**20

    def take(self, size: int) -> None:
        """Count bytes before they are allocated."""
        self.left -= size
        if self.left < 0:
            raise Broken(f"its content is more than {TIMES} times as large as the file")


class Interpreter:
    """Reads one pickle. What has its value only at its end has `build(state)` and `finish(name)`, see `Finisher`.

    Args:
        calls: full name -> function of the arguments in the pickle, in place of what has that name.
        unknown: of a name without a function, its stand-in's type, `StandIn` or a kind of dict; raises to refuse it.
        stored: what is stored under a persistent id; None if nothing can be.
        limits: of the file.
    """

    def __init__(
        self,
        calls: Mapping[str, Callable[..., Any]],
        unknown: Callable[[str], type],
        limits: Limits,
        stored: Callable[[Any], Any] | None = None,
    ):
        self.calls, self.unknown, self.limits, self.stored = calls, unknown, limits, stored
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def load(self, file: Any) -> Any:
        """The unfinished content of the pickle that begins where `file` stands; afterwards `file` is at its end."""
        for count, (code, arg, _) in enumerate(pickletools.genops(file)):
            if count > MOST:
                raise Broken(f"its pickle has more than {MOST:,} operations")
            if code.name in PUSHED:
                self.stack.append(_encodable(arg) if type(arg) is str else arg)
            elif code.name in CONSTANTS:
                self.stack.append(CONSTANTS[code.name]())
            elif code.name in ACTIONS:
                ACTIONS[code.name](self, arg)
            elif code.name not in ("PROTO", "FRAME", "STOP"):
                raise Broken(f"its pickle has an operation {code.name}")
        return self.stack.pop()

    def items(self) -> list[Any]:
        """What is on the stack above the last mark."""
        found, self.stack = self.stack, self.marked.pop()
        return found

    def push(self, value: Any) -> None:
        """Push a value."""
        self.stack.append(value)

    def mark(self, _: object) -> None:
        """Begin a new stack."""
        self.marked.append(self.stack)
        self.stack = []

    def push_tuple(self, count: int) -> None:
        """Replace the last items by a tuple of them."""
        if len(self.stack) < count:
            raise Broken("its pickle is damaged")
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def recall(self, place: int) -> None:
        """Push what was stored."""
        self.stack.append(self.memo[place])

    def store(self, place: int) -> None:
        """Store what is on top."""
        self.memo[place] = self.stack[-1]

    def name(self, module: str, name: str) -> None:
        """Push a name, or refuse it."""
        # Protocol 2 writes the modules' names of Python 2.
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        full = f"{module}.{name}"
        if not full.isprintable():
            raise Broken(f"a name has control characters: {full[:40]!a}")
        if full not in self.calls:
            self.unknown(full)
        self.stack.append(Name(full))

    def stack_name(self, _: object) -> None:
        """`name`, from the stack."""
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise Broken("its pickle is damaged")
        self.name(module, name)

    def call(self, _: object) -> None:
        """Replace a name and its arguments by what the reader's table makes of them."""
        args, name = self.stack.pop(), self.stack.pop()
        if not isinstance(name, Name) or not isinstance(args, tuple):
            raise Broken("it holds more than tensors and plain containers")
        function = self.calls.get(name.full)
        self.stack.append(function(*args) if function else self.unknown(name.full)())

    def call_with_names(self, _: object) -> None:
        """`call` with named arguments, which only stand-ins have."""
        self.stack.pop()
        self.call(None)

    def build(self, _: object) -> None:
        """Give the last item its state."""
        state = self.stack.pop()
        if hasattr(self.stack[-1], "build"):
            self.stack[-1].build(state)

    def append(self, items: list[Any]) -> None:
        """Append to the list on top."""
        held = self.stack[-1]
        if type(held) is list:
            held.extend(items)
        elif type(held) is not StandIn:
            raise Broken("its pickle is damaged")

    def add(self, _: object) -> None:
        """Add to the set on top."""
        items, held = self.items(), self.stack[-1]
        if type(held) is not set:
            raise Broken("its pickle is damaged")
        held.update(map(key, items))

    def put(self, pairs: list[Any]) -> None:
        """Fill the dict on top."""
        held = self.stack[-1]
        if type(held) in (dict, OrderedDict) and len(pairs) % 2 == 0:
            held.update((key(pairs[place]), pairs[place + 1]) for place in range(0, len(pairs), 2))
        elif type(held) is not StandIn:
            raise Broken("its pickle is damaged")

    def put_one(self, _: object) -> None:
        """`put` of the last two items."""
        value, name = self.stack.pop(), self.stack.pop()
        self.put([name, value])

    def push_dict(self, _: object) -> None:
        """Push a dict of the items."""
        pairs = self.items()
        self.stack.append({})
        self.put(pairs)

    def persistent(self, _: object) -> None:
        """Replace an id by what is stored under it."""
        if self.stored is None:
            raise Broken("it names data outside of its pickle")
        self.stack.append(self.stored(self.stack.pop()))


ACTIONS: dict[str, Callable[[Interpreter, Any], Any]] = {
    "MARK": Interpreter.mark,
    "POP": lambda it, _: it.stack.pop() if it.stack else it.items(),
    "POP_MARK": lambda it, _: it.items(),
    "DUP": lambda it, _: it.stack.append(it.stack[-1]),
    "LIST": lambda it, _: it.push(it.items()),
    "TUPLE": lambda it, _: it.push(tuple(it.items())),
    "TUPLE1": lambda it, _: it.push_tuple(1),
    "TUPLE2": lambda it, _: it.push_tuple(2),
    "TUPLE3": lambda it, _: it.push_tuple(3),
    "DICT": Interpreter.push_dict,
    "FROZENSET": lambda it, _: it.push(set(map(key, it.items()))),
    "APPEND": lambda it, _: it.append([it.stack.pop()]),
    "APPENDS": lambda it, _: it.append(it.items()),
    "ADDITEMS": Interpreter.add,
    "SETITEM": Interpreter.put_one,
    "SETITEMS": lambda it, _: it.put(it.items()),
    **{f"{size}GET": Interpreter.recall for size in ("", "BIN", "LONG_BIN")},
    **{f"{size}PUT": Interpreter.store for size in ("", "BIN", "LONG_BIN")},
    "MEMOIZE": lambda it, _: it.store(len(it.memo)),
    "GLOBAL": lambda it, names: it.name(*names.split(" ", 1)),
    "STACK_GLOBAL": Interpreter.stack_name,
    "REDUCE": Interpreter.call,
    "NEWOBJ": Interpreter.call,
    "NEWOBJ_EX": Interpreter.call_with_names,
    "BUILD": Interpreter.build,
    "BINPERSID": Interpreter.persistent,
}
CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    **{"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple, "EMPTY_SET": set},
}
#: Opcodes whose argument is the value. LONG4 is not among them: Python prints no integer of more than 4300 digits.
PUSHED = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES"
    " BINBYTES8 BYTEARRAY8 UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8".split()
)


def _encodable(text: str) -> str:
    """Text that can be printed: a surrogate cannot."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def key(value: Any) -> Any:
    """A value that may be a key, unchanged: a scalar, a stand-in, or a tuple of such."""
    for part in value if type(value) is tuple else (value,):
        if type(part) not in (*KEYS, Name, StandIn):
            raise Broken(f"a {type(part).__name__} is a key")
        if isinstance(part, int) and not -(2**63) <= part < 2**64:  # the hashes of larger ones can be made alike
            raise Broken("an integer of more than 64 bits is a key")
        if isinstance(part, str) and not part.isprintable():
            raise Broken(f"a name has control characters: {part[:40]!a}")
    return value


class Finisher:
    """Puts `value.finish(name)` in the place of each value that has it; `name` is the key of the dict that holds it.

    `Broken` for content that is nested too deeply, or in itself, or repeats itself too often.
    """

    def __init__(self) -> None:
        self.known: dict[int, tuple[Any, Any, int, int]] = {}  #: id -> it, finished, its items in all, its depth
        self.inside: set[int] = set()

    def finish(self, value: Any) -> Any:
        """The content, finished. Lists and dicts are changed in place, and what is shared stays shared."""
        return self.visit(value, "", 0)[0]

    def visit(self, value: Any, name: str, above: int) -> tuple[Any, int, int]:
        """A value finished, its number of items in all, and its depth."""
        if not isinstance(value, list | tuple | dict) and not hasattr(value, "finish"):
            return value, 1, 0
        if id(value) in self.inside or above > DEEPEST:
            raise Broken("its content is nested too deeply, or in itself")
        if id(value) not in self.known:
            self.inside.add(id(value))
            self.known[id(value)] = (value, *self.parts(value, name, above))
            self.inside.remove(id(value))
        _, finished, size, depth = self.known[id(value)]
        if size > MOST or above + depth > DEEPEST:
            raise Broken("its content repeats itself too often, or is nested too deeply")
        return finished, size, depth

    def parts(self, value: Any, name: str, above: int) -> tuple[Any, int, int]:
        """As `visit`, for what has not been visited."""
        if hasattr(value, "finish"):
            return value.finish(name), 1, 0
        pairs = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
        names = [held if isinstance(held, str) else name for held, _ in pairs]
        visited = [self.visit(item, named, above + 1) for named, (_, item) in zip(names, pairs, strict=True)]
        if isinstance(value, tuple):
            value = tuple(finished for finished, _, _ in visited)
        else:
            for (place, _), (finished, _, _) in zip(pairs, visited, strict=True):
                value[place] = finished
        return value, 1 + sum(size for _, size, _ in visited), 1 + max((depth for *_, depth in visited), default=0)

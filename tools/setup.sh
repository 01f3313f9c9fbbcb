#!/usr/bin/env bash
# Makes a virtual environment with this project in it (editable). Safe to run again: it does only what is missing.
set -euo pipefail

usage="usage: tools/setup.sh [--extras det,seg|all] [--venv DIR]
  --extras  what to install besides the core and the test tools: det, seg, corruptions or all (kept by later runs)
  --venv    where to make the environment (default: .venv in the repository root)
  PYTHON=... chooses the interpreter (default: the newest of Python 3.10 to 3.13)"
die() { echo "setup: $*" >&2; exit 1; }

cwd=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
venv=$root/.venv
extras=dev
need_gb=12  # 6 GB installed; pip fetches 3 GB, and may hold them twice meanwhile (temporary folder and cache)
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) echo "$usage"; exit 0 ;;
        --extras) [ $# -ge 2 ] || die "--extras needs a value: det, seg, corruptions or all"; extras=$extras,$2; shift 2 ;;
        --venv) [ $# -ge 2 ] || die "--venv needs a folder"
                case $2 in /*) venv=$2 ;; *) venv=$cwd/$2 ;; esac; shift 2 ;;
        *) die "unknown argument '$1' (see tools/setup.sh --help)" ;;
    esac
done
for extra in ${extras//,/ }; do
    case $extra in dev | det | seg | corruptions | all) ;; *) die "no extra '$extra': choose from det, seg, corruptions, all" ;; esac
done

# Two runs at once: the second waits, then finds the work done. The lock goes with the process.
exec 9< tools/setup.sh
if command -v flock > /dev/null; then flock 9; fi

log=$venv/setup.log
stamp=$venv/setup.stamp  # written last, so an interrupted run leaves none
version() { "$1" -c "import sys${2:+, $2}; print('%d.%d' % sys.version_info[:2])" 2> /dev/null; }
suitable() { "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2> /dev/null; }

if have=$(version "$venv/bin/python" pip); then
    python=$venv/bin/python
    if [ -n "${PYTHON:-}" ] && [ "$(version "$PYTHON" || true)" != "$have" ]; then
        die "$venv was made with Python $have, not with PYTHON=$PYTHON: remove it, or choose another folder with --venv"
    fi
else
    if [ -e "$venv" ] && [ ! -e "$venv/pyvenv.cfg" ] && [ -n "$(ls -A "$venv")" ]; then
        die "$venv exists and is no virtual environment: choose another folder with --venv"
    fi
    python=
    for name in ${PYTHON:-python3.13 python3.12 python3.11 python3.10 python3}; do
        if suitable "$name"; then python=$name; break; fi
    done
    [ -n "$python" ] || die "no Python 3.10 to 3.13 with the modules venv and ensurepip" \
        "(tried: ${PYTHON:-python3.13 to python3.10, python3}): install one (on Debian and Ubuntu also python3-venv)," \
        "or name one with PYTHON=..."
    have=$(version "$python")
fi

# The root is part of the key because an editable install of a moved or copied tree still points at the old one.
key="$(cat pyproject.toml constraints.txt | cksum) $have $root"
if [ -f "$stamp" ]; then
    { read -r old_key; read -r old_extras; } < "$stamp"
    missing=
    for extra in ${extras//,/ }; do
        case ,$old_extras, in *,"$extra",* | *,all,*) ;; *) missing=1 ;; esac
    done
    if [ "$old_key" = "$key" ] && [ -z "$missing" ]; then
        echo "setup: $venv is up to date (Python $have, extras: $old_extras)"
        exit 0
    fi
    [ -n "$missing" ] && extras=$old_extras,$extras || extras=$old_extras
fi
extras=$(echo "$extras" | tr , '\n' | sort -u | paste -sd , -)

mkdir -p "$venv" || die "cannot make $venv"
rm -f "$stamp"
if [ ! -e "$venv"/lib/python"$have"/site-packages/torch ]; then
    free_gb=$(df -Pk "$venv" | awk 'NR == 2 { print int($4 / 1048576) }')
    [ "$free_gb" -ge "$need_gb" ] || die "$venv has $free_gb GB of free disk space, the install needs about $need_gb GB"
fi

echo "setup: installing semaim[$extras] with Python $have into $venv (6 GB in all, some minutes; log: $log)"
start=$SECONDS
if [ "$python" != "$venv/bin/python" ]; then
    "$python" -m venv "$venv" > "$log" 2>&1 || die "could not make the environment: $(tail -n 1 "$log") ($log)"
fi
if ! "$venv/bin/python" -m pip install --disable-pip-version-check --progress-bar off --no-input \
    -c constraints.txt -e ".[$extras]" > "$log" 2>&1; then
    reason=$(grep -E '^ *(ERROR|error):' "$log" | grep -v 'ResolutionImpossible\|subprocess-exited' |
        tail -n 1 | sed 's/^ *//' || true)
    if grep -q 'Retrying (Retry' "$log"; then reason="no network? $reason"; fi
    die "pip failed: ${reason:-$(tail -n 1 "$log")} (the whole output: $log)"
fi
printf '%s\n%s\n' "$key" "$extras" > "$stamp"
echo "setup: done in $((SECONDS - start)) s; check it with $venv/bin/python tools/check_env.py"

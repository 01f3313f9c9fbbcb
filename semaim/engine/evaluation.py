"""What a checkpoint is worth: accuracy of a classifier, and k-NN or a fast linear probe on the encoder's features."""

import hashlib
import json
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import is_main_process
from mmengine.logging import MMLogger
from mmengine.registry import LOOPS, MODELS
from torch import Tensor, nn

from semaim import checkpoints
from semaim.checkpoints.consumers import NEW_IN_CLASSIFIERS
from semaim.checkpoints.normalisation import choose, settle
from semaim.engine.features import extract_features, fast_probe, knn_accuracy
from semaim.engine.launcher import join
from semaim.engine.network import NetworkModel
from semaim.engine.results import record_load, record_origin, write_results
from semaim.engine.runner import SeededRunner, evaluation_loader
from semaim.engine.training import build_datasets, build_validation, load_pretrained
from semaim.errors import UserError

RANDOM = "random"  #: in place of a checkpoint: the encoder as it is initialised


@LOOPS.register_module()
class NearestNeighbours:
    """Weighted k-NN on the encoder's features.

    Args:
        ks: numbers of neighbours; those beyond the number of training images are left out.
        temperature: of the weights exp(cosine / temperature).

    Source of the numbers: DINO, `eval_knn.py`.
    """

    def __init__(self, ks: tuple[int, ...] = (10, 20, 100, 200), temperature: float = 0.07):
        self.ks, self.temperature = tuple(ks), temperature

    def run(self, train: tuple, val: tuple, classes: int, device: torch.device, log) -> dict[str, float]:
        """(features, labels) of both splits -> metrics; `UserError` where no k is left."""
        images = len(train[0])
        # With none left the smallest is asked for, and refused.
        ks = [k for k in self.ks if k <= images] or [min(self.ks)]
        if len(ks) < len(self.ks):
            left = ", ".join(str(k) for k in self.ks if k not in ks)
            log(f"k-NN: k = {left} left out, there are {images} training images")
        found = knn_accuracy(*train, *val, classes, ks=ks, temperature=self.temperature, device=device)
        for k, (top1, top5) in found.items():
            log(f"k-NN, k = {k:3d}: top-1 {top1:.2f}  top-5 {top5:.2f}")
        metrics = {
            f"knn{k}_top{n}": value for k, values in found.items() for n, value in zip((1, 5), values, strict=True)
        }
        best = max(found, key=lambda k: found[k][0])
        log(f"best of these on the validation images: k = {best}, top-1 {found[best][0]:.2f}")
        return metrics


@LOOPS.register_module()
class FastProbe:
    """A linear classifier on features that are extracted once, without augmentation: many learning rates side by side.

    The learning rate is chosen on a held-out part of the training images. Not comparable with published linear probes,
    which augment.

    Args:
        lrs: learning rates tried; None for the default range.
        epochs, batch: of the probe's training.
        held_out: share of the training images on which the learning rate is chosen.
    """

    def __init__(
        self, lrs: tuple[float, ...] | None = None, epochs: int = 50, batch: int = 1024, held_out: float = 0.1
    ):
        self.options = {"epochs": epochs, "batch": batch, "held_out": held_out} | ({"lrs": tuple(lrs)} if lrs else {})

    def run(self, train: tuple, val: tuple, classes: int, device: torch.device, log) -> dict[str, float]:
        """(features, labels) of both splits -> metrics; the main process computes, the others get none."""
        if not is_main_process():
            return {}
        found = fast_probe(*train, *val, classes, **self.options, device=device)
        for lr, accuracy in found.held_out.items():
            log(f"fast probe, learning rate {lr:8.4g}: {accuracy:.2f} on the held-out training images")
        log(f"fast probe: top-1 {found.top1:.2f}  top-5 {found.top5:.2f} with learning rate {found.lr:g}")
        if found.at_border:
            log("the best learning rate is at the border of those tried: widen evaluation.lrs")
        return {"probe_top1": found.top1, "probe_top5": found.top5, "probe_lr": found.lr}


def evaluate(cfg: Config, weights: str | None) -> dict[str, float]:
    """Measure a checkpoint as the config says, in this process and, where launched so, in step with its siblings.

    Args:
        cfg: with an `evaluation` on features, or of a stage whose checkpoints hold a classifier.
        weights: a checkpoint of any dialect, or "random" for features of an untrained encoder.
    """
    join()
    torch.manual_seed(cfg.seed)
    if "evaluation" in cfg:
        return evaluate_features(cfg, weights)
    return evaluate_classifier(cfg, weights)


def check_evaluation(cfg: Config, weights: str | None) -> None:
    """`UserError` for what can be known to be wrong before any process starts."""
    if not weights:
        raise UserError(
            "name a checkpoint: tools/test.py CONFIG FILE"
            + (f" (or {RANDOM}, for an untrained encoder)" if "evaluation" in cfg else "")
        )
    if cfg.model.type != "Classification":
        raise UserError("this config pretrains: evaluate with one of semaim/configs/{knn,linear,finetune}")
    choose(cfg, None if weights == RANDOM else weights)
    if weights == RANDOM:
        return
    found = checkpoints.read(weights)
    if "evaluation" in cfg:
        with torch.device("meta"):  # names and sizes are compared without memory
            network = MODELS.build(cfg.model).network
        checkpoints.fit(network, found, NEW_IN_CLASSIFIERS, cfg.get("allow_partial", False))


def evaluate_features(cfg: Config, weights: str) -> dict[str, float]:
    """k-NN or the fast probe."""
    device = torch.device(get_device())
    log = logger_of(cfg).info
    statistics = settle(cfg, None if weights == RANDOM else weights)
    train, val = build_datasets(cfg)
    record_origin(cfg, None if weights == RANDOM else weights)
    model: NetworkModel = MODELS.build({**cfg.model, "compile": cfg.compile})
    if weights == RANDOM:
        log("random weights: the encoder as it is initialised")
    else:
        log(str(record_load(load_pretrained(model.network, weights, cfg.get("allow_partial", False)), cfg)))
    log(f"images normalised with {statistics}")
    model.to(device).eval()

    def encode(images: Tensor) -> Tensor:
        with model.autocast(device):
            return model.network.features(images).float()

    digest = digest_of(model.network)
    sets = []
    for name, images in (("train", train), ("val", val)):
        key = {
            "weights": digest,
            "pool": model.network.pooling,
            "precision": model.precision if device.type == "cuda" else "fp32",
            "paths": hashlib.sha256(b"\n".join(images.paths.tolist())).hexdigest(),
            "transform": repr(images.transform),
        }
        sets.append(
            extract_features(
                encode,
                evaluation_loader(images, cfg.images_per_gpu, cfg.num_workers),
                len(images),
                model.network.embed_dim,
                device,
                cache=Path(cfg.work_dir) / "features" / name,
                key=json.dumps(key),
                log=log,
            )
        )
    metrics = LOOPS.build(cfg.evaluation).run(*sets, len(train.classes), device, log)
    path = None if weights == RANDOM else weights
    features = model.network.pooling
    write_results(cfg, metrics, len(train), len(val), path, stage=cfg.evaluation.type, features=features)
    return metrics


def digest_of(network: nn.Module) -> str:
    """A hash of all weights."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def evaluate_classifier(cfg: Config, weights: str) -> dict[str, float]:
    """Top-1, top-5 and loss of a fine-tuned or probed checkpoint on the validation images."""
    found = checkpoints.read(weights)
    head = next((found.state[name] for name in ("head.weight", "head.1.weight") if name in found.state), None)
    if head is None:
        raise UserError(f"{weights} has no classifier: fine-tune it first (tools/train.py CONFIG --pretrained FILE)")
    record_origin(cfg, weights, whole=True)
    statistics = settle(cfg, weights)
    val = build_validation(cfg)
    classes = val.classes
    cfg.model.network.num_classes = len(classes)
    if len(head) != len(classes):
        raise UserError(f"{weights} knows {len(head)} classes, {cfg.dataset.root} has {len(classes)}")
    if found.classes and list(found.classes) != classes:
        other = next(name for name, ours in zip(found.classes, classes, strict=True) if name != ours)
        raise UserError(f"{weights} knows the class {other}, which {cfg.dataset.root} has not, or in another place")
    runner = SeededRunner(
        model=cfg.model,
        work_dir=cfg.work_dir,
        test_dataloader=evaluation_loader(val, cfg.images_per_gpu, cfg.num_workers),
        test_cfg={"type": "TestLoop"},
        test_evaluator={"type": "ClassAccuracy"},
        default_hooks={**cfg.default_hooks, "checkpoint": None},
        launcher="pytorch" if torch.distributed.is_initialized() else "none",
        default_scope=cfg.default_scope,
        log_processor=cfg.log_processor,
        randomness={"seed": cfg.seed},
        experiment_name=str(Path(cfg.work_dir).resolve()).replace("/", "_") + "_test",
        cfg=cfg,
    )
    model = getattr(runner.model, "module", runner.model)
    report = checkpoints.load(model.network, found, partial=True)
    runner.logger.info(str(report))
    runner.logger.info(f"images normalised with {statistics}")
    if report.missing:
        raise UserError(
            f"{weights} lacks {', '.join(report.missing[:3])}, which this config's classifier has: evaluate it with the"
            " config of its training"
        )
    if not cfg.get("allow_partial", False):
        report.refuse()
    record_load(report, cfg)
    metrics = runner.test()
    write_results(cfg, metrics, None, len(val), weights, stage="Classification")
    return metrics


def logger_of(cfg: Config) -> MMLogger:
    """A logger to the terminal, on the main process."""
    name = str(Path(cfg.work_dir).resolve()).replace("/", "_")
    return MMLogger.get_instance(name, logger_name="mmengine", distributed=torch.distributed.is_initialized())

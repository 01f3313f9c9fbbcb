"""Shared by the tasks on frozen features: k-NN, the fast linear probe."""

import hashlib
import json
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import MMLogger
from mmengine.registry import LOOPS
from torch import Tensor, nn

from semaim.engine.classification import Classification
from semaim.engine.encoders import settle_images
from semaim.engine.extraction import extract_features
from semaim.engine.images import ImageTask, build_datasets, empty_model, fit_encoder
from semaim.engine.results import record_load, record_origin, write_results
from semaim.engine.runner import evaluation_loader
from semaim.engine.training import Prepared
from semaim.reading import forget
from semaim.registry import build_model

RANDOM = "random"  #: instead of a checkpoint: the encoder with its initial weights


class FeatureTask(ImageTask):
    """Measures features of a frozen encoder, extracted once, by the config's `evaluation`."""

    keys = {**ImageTask.keys, "evaluation": "what is measured on features"}
    instead = f" (or {RANDOM}, for an untrained encoder)"
    trains = False
    published = False

    def prepare_test(self, cfg: Config, weights: str, check: bool) -> Prepared:
        """See `semaim.engine.testing.prepare_test`."""
        self.enter(cfg)
        statistics = settle_images(cfg, None if weights == RANDOM else weights)
        if check and weights != RANDOM:
            fit_encoder(cfg, empty_model(cfg).network, weights)
        train, val = build_datasets(cfg)
        return Prepared(self, statistics, train=train, val=val)

    def measure(self, cfg: Config, run: Prepared, weights: str) -> dict[str, float]:
        """The metrics of the config's `evaluation`."""
        device = torch.device(get_device())
        log = logger_of(cfg).info
        path = None if weights == RANDOM else weights
        record_origin(cfg, path)
        model: Classification = build_model({**cfg.model, "compile": cfg.compile})
        if path is None:
            log("random weights: the encoder as initialised")
        else:
            log(str(record_load(self.load_encoder(cfg, model, path), cfg)))
        log(f"images normalised with {run.statistics}; {cfg.model.network.img_size} pixels")
        forget()
        features = extract_both(cfg, run, model.to(device).eval(), device, log)
        metrics = LOOPS.build(cfg.evaluation).run(*features, len(run.train.classes), device, log)
        more = {"stage": cfg.evaluation.type, "features": model.network.pooling}
        write_results(cfg, metrics, len(run.train), len(run.val), path, **more)
        return metrics


def extract_both(cfg: Config, run: Prepared, model: Classification, device: torch.device, log) -> list[tuple]:
    """(features, labels) of the training and of the validation images; read from the work folder if they are there."""

    def encode(images: Tensor) -> Tensor:
        with model.autocast(device):
            return model.network.features(images).float()

    digest = digest_of(model.network)
    sets = []
    for name, images in (("train", run.train), ("val", run.val)):
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
    return sets


def digest_of(network: nn.Module) -> str:
    """A hash of all weights."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def logger_of(cfg: Config) -> MMLogger:
    """A logger to the terminal, on the main process."""
    name = str(Path(cfg.work_dir).resolve()).replace("/", "_")
    return MMLogger.get_instance(name, logger_name="mmengine", distributed=torch.distributed.is_initialized())

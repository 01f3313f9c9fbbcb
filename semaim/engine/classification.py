"""Classification under mmengine's runner: fine-tuning and linear probing, and their accuracy."""

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.dist import get_world_size
from mmengine.evaluator import BaseMetric
from mmengine.registry import DATASETS, METRICS
from timm.data import Mixup
from torch import Tensor

from semaim.data.labelled import LabelledImages
from semaim.encoders.networks import PlainClassifier
from semaim.engine.network import NetworkModel
from semaim.errors import UserError
from semaim.models.classifier import Classifier
from semaim.registry import MODELS, build_model

DATASETS.register_module(module=LabelledImages)


#: Arguments of our own ViT's sizes, which another encoder has itself.
OWN = ("size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio", "fc_norm")


def build_classifier(encoder: dict | None = None, **kwargs) -> Classifier | PlainClassifier:
    """A `Classifier`, or a `PlainClassifier` on the described encoder, from plain values.

    Args:
        encoder: the description of an encoder of any family, which the source of the weights gives in configs
            `plain_*`; None for this suite's own ViT of the sizes here.
        **kwargs: of either.
    """
    try:
        if encoder is not None:
            return PlainClassifier(encoder, **{key: value for key, value in kwargs.items() if key not in OWN})
        return Classifier(**{key: value for key, value in kwargs.items() if (key, value) != ("img_size", None)})
    except (ValueError, TypeError) as error:
        raise UserError(f"model.network: {error}") from None


setattr(build_classifier, "arguments_of", Classifier)  # noqa: B010  # for the check of config keys
MODELS.register_module(name="Classifier", module=build_classifier)


@MODELS.register_module()
class Classification(NetworkModel):
    """A classifier as mmengine trains it.

    Args:
        network: config of the `Classifier`.
        precision, cpu_precision: as for `NetworkModel`.
        mixup, cutmix: parameters of the beta distributions of timm's Mixup; if both are above 0, each is used in half
            of the batches.
        label_smoothing: share of the target that all classes divide equally.
    """

    network: Classifier | PlainClassifier

    def __init__(
        self,
        network: dict,
        precision: str = "bf16",
        mixup: float = 0.0,
        cutmix: float = 0.0,
        label_smoothing: float = 0.0,
        cpu_precision: str = "fp32",
    ):
        super().__init__(build_model(network), precision, cpu_precision=cpu_precision)
        self.label_smoothing = label_smoothing
        classes = self.network.num_classes
        mixes = mixup > 0 or cutmix > 0
        self.mixup = Mixup(mixup, cutmix, label_smoothing=label_smoothing, num_classes=classes) if mixes else None

    def describe(self) -> str:
        """What is trained, in one line."""
        network = self.network
        what = "probe of the frozen encoder" if network.probe else "all layers"
        return f"{what}; {network.pooling} -> {network.num_classes} classes"

    def forward(
        self, image: Tensor, label: Tensor, index: Tensor, mode: str = "loss"
    ) -> dict[str, Tensor] | list[dict]:
        """Images (B, 3, H, W), normalised, and labels (B,).

        Returns:
            In mode "loss" a dict with the scalar training loss. Else a list of one dict of tensors for the whole batch:
            cross-entropy, whether the label is the top class or among the top five, and the images' `index`.
        """
        if mode == "loss":
            if self.mixup:
                image, target = self.mixup(image, label)
                smoothing = 0.0  # the mixed targets already include it
            else:
                target, smoothing = label, self.label_smoothing
            with self.autocast(image.device):
                logits = self.network(image)
            return {"loss": F.cross_entropy(logits.float(), target, label_smoothing=smoothing)}
        with self.autocast(image.device):
            logits = self.network(image).float()
        best = logits.topk(min(5, logits.shape[1])).indices == label[:, None]
        return [
            {
                "loss": F.cross_entropy(logits, label, reduction="none"),
                "top1": best[:, 0],
                "top5": best.any(dim=1),
                "index": index,
            }
        ]


@METRICS.register_module()
class ClassAccuracy(BaseMetric):
    """Top-1 and top-5 accuracy in percent and mean cross-entropy; every image counts once, on any number of processes.

    Each process's loader has its own share of the images, without repetition, so sums and hits are added up.

    Attributes:
        hits: "top1" and "top5" -> (M,), 1 for each image of the last evaluation that was right, else 0; on the CPU.
    """

    default_prefix = ""
    hits: dict[str, np.ndarray]

    def process(self, data_batch: dict, data_samples: list[dict[str, Tensor]]) -> None:
        """Keep what a batch has."""
        kept = ("loss", "top1", "top5", "index")
        self.results += [torch.stack([sample[name].double() for name in kept]) for sample in data_samples]

    def compute_metrics(self, results: list[Tensor]) -> dict[str, float]:
        """Sums of loss, top-1, top-5 and images over all processes -> the three means."""
        loss, top1, top5, count = torch.stack(results).sum(dim=0).tolist()
        return {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "loss": loss / count}

    def evaluate(self, size: int) -> dict[str, float]:
        """The metrics over all processes; `size` is the number of images, all of which must have been evaluated."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        own = torch.cat([torch.zeros(4, 0, dtype=torch.float64), *(rows.cpu() for rows in self.results)], dim=1)
        self.results.clear()
        # Losses summed, and per image: top-1, top-5, how often it was evaluated.
        rows = torch.zeros(1 + size, 3, dtype=torch.float64)
        rows[0, 0] = own[0].sum()
        rows.index_add_(0, 1 + own[3].long(), torch.stack([own[1], own[2], torch.ones_like(own[0])], dim=1))
        if get_world_size() > 1:
            rows = rows.to(device)
            torch.distributed.all_reduce(rows)
            rows = rows.cpu()
        loss, hits = rows[0, 0], rows[1:]
        if not bool((hits[:, 2] == 1).all()):
            raise RuntimeError(f"{int((hits[:, 2] == 1).sum())} images were evaluated once, of {size}")
        self.hits = {"top1": hits[:, 0].numpy(), "top5": hits[:, 1].numpy()}
        return self.compute_metrics([torch.stack([loss, *hits.sum(dim=0)])])

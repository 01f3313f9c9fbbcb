"""COCO's metric with a faster evaluator, and on a part of an annotation file's images."""

from tempfile import TemporaryDirectory

from mmdet.evaluation import CocoMetric
from mmengine.fileio import load
from mmengine.logging import MMLogger

from semaim.errors import UserError

#: Figures of `COCOeval.stats`, in its order.
STATS = ("mAP", "mAP_50", "mAP_75", "mAP_s", "mAP_m", "mAP_l")


class FasterCocoMetric(CocoMetric):
    """mmdet's `CocoMetric` with faster-coco-eval in place of pycocotools: the same figures, faster.

    Takes `CocoMetric`'s arguments; supports its metrics bbox and segm, without the table by class.
    """

    # mmdet's, None until the first evaluation.
    cat_ids: list[int] | None
    img_ids: list[int] | None

    def __init__(self, *arguments, **options):
        try:
            import faster_coco_eval
        except ImportError:
            raise UserError("FasterCocoMetric needs faster-coco-eval: pip install faster-coco-eval") from None
        self._evaluator = faster_coco_eval
        super().__init__(*arguments, **options)

    def compute_metrics(self, results: list[tuple[dict, dict]]) -> dict[str, float]:
        """(ground truth, predictions) of every image -> bbox_mAP, ..., segm_mAP, ... from 0 to 1, to three digits."""
        api = self._coco_api
        self.cat_ids = self.cat_ids or api.get_cat_ids(cat_names=self.dataset_meta["classes"])
        self.img_ids = self.img_ids or api.get_img_ids()
        log = MMLogger.get_current_instance()
        found: dict[str, float] = {}
        with TemporaryDirectory() as folder:
            files = self.results2json([predictions for _, predictions in results], self.outfile_prefix or f"{folder}/r")
            predicted = {metric: load(files[metric]) for metric in self.metrics}
        truth = self._evaluator.COCO(api.dataset)
        for metric, boxes in predicted.items():
            if not boxes:
                log.error("The testing results of the whole dataset is empty.")
                break
            if metric == "segm":  # otherwise the size of an object would be its box's area
                boxes = [{key: value for key, value in box.items() if key != "bbox"} for box in boxes]
            evaluation = self._evaluator.COCOeval_faster(
                truth, truth.loadRes(boxes), iouType=metric, print_function=lambda *_, **__: None
            )
            evaluation.params.catIds, evaluation.params.imgIds = self.cat_ids, self.img_ids
            evaluation.params.maxDets, evaluation.params.iouThrs = list(self.proposal_nums), self.iou_thrs
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            found |= {f"{metric}_{name}": round(float(evaluation.stats[i]), 3) for i, name in enumerate(STATS)}
            log.info(f"{metric}: " + "  ".join(f"{name} {found[f'{metric}_{name}']:.3f}" for name in STATS))
        return found


class _OfPart(CocoMetric):
    """Measures the images that were predicted, where mmdet's metric takes all of the annotation file.

    Annotations may have the id 0, from which labelling tools number them: it is replaced, as the metric takes it for no
    match.
    """

    any_id = True  #: read by the check of the annotations
    img_ids: list[int] | None

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        annotations = self._coco_api.anns if self._coco_api is not None else {}
        if (first := annotations.pop(0, None)) is not None:
            first["id"] = max([0, *annotations]) + 1  # also in the lists by image, which hold the same record
            annotations[first["id"]] = first

    def compute_metrics(self, results: list[tuple[dict, dict]]) -> dict[str, float]:
        """As the metric's, of the images in `results`."""
        self.img_ids = [predicted["img_id"] for _, predicted in results]
        return super().compute_metrics(results)


class PartCocoMetric(_OfPart, CocoMetric):
    """mmdet's `CocoMetric` of a part of an annotation file's images, see `PartOfCoco`."""


class PartFasterCocoMetric(_OfPart, FasterCocoMetric):
    """`FasterCocoMetric` of a part of an annotation file's images."""

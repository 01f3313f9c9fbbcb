"""Words that flags choose from, so that `--help` needs no import of what defines them; a test holds the two equal."""

DIALECTS = ("semaim", "timm", "mae", "mmpretrain")  #: `semaim.checkpoints.DIALECTS`
FORMATS = ("md", "csv", "latex", "html")  #: keys of `semaim.results.formats.FORMATS`

# Of `semaim.results.stages`.
SCALES = ("quick", "study", "paper")
METHODS = ("semaim", "saim", "raster", "mae", "scratch")
VARIANTS = ("similarity", "semaim-ema", "similarity-ema", "saim-ema", "raster-ema")
STAGES = ("pretrain", "knn", "linear", "finetune", "detection", "segmentation")  #: its `NAMES`

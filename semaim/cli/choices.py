"""Choices of flags, copied so that `--help` need not import what defines them; a test keeps the two equal."""

DIALECTS = ("semaim", "timm", "mae", "mmpretrain")  #: `semaim.checkpoints.DIALECTS`
POOLS = ("cls", "avg", "native")  #: keys of `semaim.encoders.POOLS`
FORMATS = ("md", "csv", "latex", "html")  #: keys of `semaim.results.formats.FORMATS`

# Of `semaim.results.stages`.
SCALES = ("quick", "study", "paper")

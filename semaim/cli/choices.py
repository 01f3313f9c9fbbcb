"""Words that flags choose from, so that `--help` needs no import of what defines them; a test holds the two equal."""

DIALECTS = ("semaim", "timm", "mae", "mmpretrain")  #: `semaim.checkpoints.DIALECTS`
FORMATS = ("md", "csv", "latex", "html")  #: keys of `semaim.results.formats.FORMATS`

# Of `semaim.results.stages`.
SCALES = ("quick", "study", "paper")

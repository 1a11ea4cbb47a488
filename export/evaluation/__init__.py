"""What students can do, measured: judges, measures and reports."""

from snoopi_rt.export.torchvision_operators import import_torchvision

# At import, unlike all else: modules of this package import transformers and diffusers, and these torchvision, if it is installed, which
# beside a CPU build of torch only imports this way. The commands' own call comes too late for `eval all`, and tests and tools make none.
import_torchvision()

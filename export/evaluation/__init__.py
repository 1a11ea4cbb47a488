"""What students can do, measured: judges, measures and reports."""

from snoopi_rt.export.torchvision_operators import import_torchvision

import_torchvision()  # before transformers and diffusers, which import it where it is installed

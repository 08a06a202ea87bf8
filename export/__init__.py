"""Conversion of a checkpoint to a .pte file: open, lower, assemble, write, verify."""

import logging
import warnings

# torchao logs every optional extension that is not installed, and torch.export warns of deprecations in library code.
logging.getLogger("torchao").setLevel(logging.ERROR)
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", category=FutureWarning, message=".*isinstance.treespec, LeafSpec.*")

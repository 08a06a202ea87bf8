"""Checkpoint to .pte: open, lower, assemble, write, verify."""

import logging
import warnings

# torchao reports every optional extension it does not find, and torch.export deprecations that are not the user's.
logging.getLogger("torchao").setLevel(logging.ERROR)
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", category=FutureWarning, message=".*isinstance.treespec, LeafSpec.*")

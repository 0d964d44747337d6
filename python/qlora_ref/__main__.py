"""`python -m qlora_ref VERB ...`: the console script, where it is not on the PATH."""

import sys

from .cli import main

sys.exit(main())

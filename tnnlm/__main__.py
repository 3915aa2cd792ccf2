"""``python -m tnnlm``: the command ``tnnlm`` where its folder is not on the PATH."""

import sys

from tnnlm.cli import main

sys.exit(main())

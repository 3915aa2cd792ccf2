"""Entry point of ``python -m tnnlm``, the command ``tnnlm`` where it is not on the PATH.

Python puts the current folder in front of all places where it looks for modules. This may be the folder of a
stranger's model, so it is removed before anything else is imported, unless it contains this package.
"""

import os
import sys

if not sys.flags.safe_path and os.path.realpath(sys.path[0]) != os.path.realpath(f"{__file__}/../.."):
    del sys.path[0]

from tnnlm.cli import main

if __name__ == "__main__":
    sys.exit(main())

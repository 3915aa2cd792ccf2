"""Entry point of ``python -m tnnlm``, the command ``tnnlm`` where it is not on the PATH."""

import sys

from tnnlm.cli import main

if __name__ == "__main__":
    sys.exit(main())

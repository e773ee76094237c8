"""Entry point of `python -m prlhf_lightning`."""

import os
import sys

if __name__ == "__main__" and not sys.flags.safe_path and sys.path[:1] == [os.getcwd()]:
    # `python -m` searches the current folder first: a torch.py beside the data would replace torch. The user's own
    # classes are still found there (see `utils/trust.py`), and so is this package.
    here = sys.path.pop(0)
    if os.path.dirname(os.path.dirname(os.path.abspath(__file__))) == here:
        sys.path.append(here)

try:
    from prlhf_lightning.cli.main import main
except KeyboardInterrupt:  # Ctrl+C while modules are loaded
    sys.exit(130)

if __name__ == "__main__":
    main()

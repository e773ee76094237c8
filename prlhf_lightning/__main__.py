"""Entry point of `python -m prlhf_lightning`."""

import sys

try:
    from prlhf_lightning.cli import main
except KeyboardInterrupt:  # Ctrl+C while modules are loaded
    sys.exit(130)

if __name__ == "__main__":
    main()

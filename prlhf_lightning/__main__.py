"""Entry point of `python -m prlhf_lightning`."""

from prlhf_lightning.cli import main

if __name__ == "__main__":
    main()

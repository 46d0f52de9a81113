"""``python -m evaclip``, which is what torchrun starts."""

from evaclip.cli import main

if __name__ == "__main__":
    main()

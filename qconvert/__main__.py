"""``python -m qconvert``."""

from qconvert.cli.main import run

if __name__ == "__main__":
    run()

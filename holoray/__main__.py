"""`python -m holoray`."""

from holoray.cli.main import main

if __name__ == "__main__":
    main()

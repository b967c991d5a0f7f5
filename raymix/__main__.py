"""`python -m raymix` is the command line."""

from raymix.cli.main import main

if __name__ == "__main__":
    main()

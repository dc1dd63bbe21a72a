"""`python -m blip2`: the command line, where the `blip2` command is not on the PATH."""

from blip2.cli import main

if __name__ == "__main__":
    main()

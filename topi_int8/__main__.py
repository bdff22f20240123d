"""`python -m topi_int8`: see `topi_int8.cli`."""

from .cli import main

if __name__ == "__main__":
    main()

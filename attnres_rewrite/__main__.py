"""`python -m attnres_rewrite` is `attnres-rewrite`."""

from attnres_rewrite.cli.app import main

if __name__ == "__main__":
    main()

"""`python -m colm_edge` is `colm-edge`."""

from colm_edge.cli import main

if __name__ == "__main__":
    main()

"""``python -m hf_immunize``, hence ``accelerate launch -m hf_immunize train …``."""

from hf_immunize.cli.main import main


if __name__ == "__main__":
    main()

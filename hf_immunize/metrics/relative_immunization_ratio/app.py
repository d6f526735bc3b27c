"""The Space: a widget to try the metric in a browser."""

from pathlib import Path


if __name__ == "__main__":
    import evaluate
    from evaluate.utils import launch_gradio_widget

    launch_gradio_widget(evaluate.load(str(Path(__file__).parent / "relative_immunization_ratio.py")))

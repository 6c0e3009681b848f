"""The columns of run_ladder.py's Markdown table. No torch here."""

from manako.experiments.common.markdown_table import MarkdownTable

TABLE = MarkdownTable(
    "python experiments/run_ladder.py --ladder FILE --output_dir FOLDER --table FILE",
    (
        "step",
        "from",
        "parameters",
        "learn",
        "as the expert",
        "success [95 %]",
        "blank image",
        "other instruction",
        "minutes",
        "ms a frame",
    ),
)

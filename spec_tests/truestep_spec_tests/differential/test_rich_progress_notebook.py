"""A notebook renders the display below its cell: run by a real kernel."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from truestep_fixtures.forking import ENVIRONMENT
from truestep_fixtures.isolation import environment

from truestep_spec_tests.differential.cases import skip_the_reference
from truestep_spec_tests.implementation import Implementation
from truestep_spec_tests.properties.rich_progress_cases import require_view

CELLS = (
    """
    from truestep_fixtures.data import language_dataset
    from truestep_spec_tests.differential.rich_progress_cases import drawn, trained

    acts = {3: lambda: (drawn(), print("said at step 3"))}
    trainer = trained(IMPLEMENTATION, DIRECTORY, acts, eval_dataset=language_dataset(4))
    """,
    """
    metrics = trainer.evaluate()
    """,
    """
    def fail():
        drawn()
        raise RuntimeError("no more")

    trained(IMPLEMENTATION, DIRECTORY, {3: fail})
    """,
    """
    import threading

    drawn()
    print([thread.name for thread in threading.enumerate() if thread.name == "truestep"])
    """,
)


@pytest.mark.clause("RICH-1", "RICH-4", "RICH-5")
def test_each_cell_shows_its_training_or_evaluation_and_no_other_bar(
    implementation: Implementation, tmp_path: Path
) -> None:
    skip_the_reference(implementation, "draws nothing")
    require_view(implementation)
    values = f"from pathlib import Path\nIMPLEMENTATION, DIRECTORY = {implementation.name!r}, Path({str(tmp_path)!r})"
    cells = [nbformat.v4.new_code_cell(source) for source in (values, *map(_dedented, CELLS))]
    with environment(ENVIRONMENT):
        NotebookClient(nbformat.v4.new_notebook(cells=cells), timeout=120, allow_errors=True).execute()
    training, evaluation, failure, threads = [cell.outputs for cell in cells[1:]]

    assert shown(training) == ["training ended at step 6/6"]
    assert "said at step 3" in "".join(output.text for output in training if output.output_type == "stream")
    assert shown(evaluation) == ["evaluation ended"]
    assert shown(failure) == ["training interrupted at step 3/6"]
    assert [output.ename for output in failure if output.output_type == "error"] == ["RuntimeError"]
    assert [output.text for output in threads] == ["[]\n"]
    everything = str([training, evaluation, failure])
    assert "%|" not in everything  # tqdm's bar
    assert "<progress" not in everything  # the Trainer's own for notebooks


def shown(outputs: list[nbformat.NotebookNode]) -> list[str]:
    """How what is displayed below a cell begins, which is the same as text and in HTML."""
    displayed = [output.data for output in outputs if output.output_type == "display_data"]
    texts = [data["text/plain"].partition(" · ")[0] for data in displayed]
    assert all(text in data["text/html"] for text, data in zip(texts, displayed, strict=True))
    return texts


def _dedented(source: str) -> str:
    return "\n".join(line.removeprefix("    ") for line in source.split("\n"))

"""`prepare` into a folder that it has filled before: what counts as the same request, and what is mended."""

from __future__ import annotations

from pathlib import Path

import pytest

from efficientids.data import layout
from efficientids.data.dataset import Dataset
from efficientids.data.preparation import prepare, report_page
from efficientids.data.preparation.cli import main
from efficientids.errors import UserError


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    """200 rows of which one cannot be read, and the flags that prepare them."""
    log = tmp_path / "log.csv"
    rows = [f"u{n % 7},i{n * n % 11},{n}" for n in range(199)]
    log.write_text("user_id,item_id,timestamp\n" + "\n".join([*rows, "u1,i1,yesterday"]) + "\n")
    return ["--source", "table", "--input", str(log), "--core", "0", "--output", str(tmp_path / "out")]


@pytest.mark.usefixtures("no_page")
def test_a_stricter_limit_of_bad_rows_is_another_request(tmp_path: Path, flags: list[str]) -> None:
    assert main(flags) == 0
    made = Dataset.open(tmp_path / "out").fingerprint
    with pytest.raises(UserError, match="give --overwrite to replace it"):
        main([*flags, "--max_bad_share", "0"])
    with pytest.raises(UserError, match=r"log\.csv: 1 of 200 rows cannot be read"):
        main([*flags, "--max_bad_share", "0", "--overwrite"])
    assert Dataset.open(tmp_path / "out").fingerprint == made
    assert main([*flags, "--max_bad_share", "0.5", "--overwrite"]) == 0
    assert Dataset.open(tmp_path / "out").manifest["request"]["flags"]["max_bad_share"] == 0.5


@pytest.mark.usefixtures("no_page")
def test_rows_read_under_another_limit_are_not_taken_up(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "k_core", interrupted)
        with pytest.raises(KeyboardInterrupt):
            main(flags)
    with pytest.raises(UserError, match=r"log\.csv: 1 of 200 rows cannot be read"):
        main([*flags, "--max_bad_share", "0"])


def test_a_missing_page_is_made_again(
    tmp_path: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report_page, "to_html", lambda report: f"page of {report.interactions}")
    assert main(flags) == 0
    page = tmp_path / "out" / layout.PAGE
    assert page.read_text() == "page of 199"
    page.unlink()
    for last in ("report.html was missing and is made again", "nothing was done"):
        capsys.readouterr()
        assert main(flags) == 0
        assert capsys.readouterr().out.endswith(f"(same input, same flags); {last}\n")
        assert page.read_text() == "page of 199"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["log.csv", "out"]


@pytest.mark.usefixtures("no_page")
def test_a_missing_report_is_named(tmp_path: Path, flags: list[str]) -> None:
    assert main(flags) == 0
    report = tmp_path / "out" / layout.REPORT
    text = report.read_text()
    report.unlink()
    with pytest.raises(UserError, match=r"report\.json: missing; the data set .* give --overwrite to prepare it again"):
        main(flags)
    report.write_text("{}")
    with pytest.raises(UserError, match=r"report\.json: not a readable report .* give --overwrite"):
        main(flags)
    assert main([*flags, "--overwrite"]) == 0
    assert report.read_text() == text

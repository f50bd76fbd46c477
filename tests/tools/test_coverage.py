from tools.coverage import page


def summary(statements, covered_lines, branches, covered_branches):
    return {
        "num_statements": statements,
        "covered_lines": covered_lines,
        "num_branches": branches,
        "covered_branches": covered_branches,
    }


def test_the_page_adds_up_files_by_package():
    files = {"gpt2/a.py": summary(10, 9, 4, 3), "gpt2/b.py": summary(6, 6, 0, 0), "stages/c.py": summary(0, 0, 0, 0)}
    rows = [line for line in page(files).splitlines() if line.startswith("|")][2:]
    assert rows == ["| `gpt2/` | 16 | 4 | 90.0% |", "| `stages/` | 0 | 0 | 0.0% |", "| total | 16 | 4 | 90.0% |"]

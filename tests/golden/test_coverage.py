"""The golden cases that ship are whole: none is missing, added or changed by accident.

`digests.txt` names every case of the families that this project implements, with the SHA-256 of its
JSON. It was made from the complete collection of golden cases; whoever adds or corrects a case
changes its line too.
"""

import hashlib
import json

from tests.golden import FOLDER, load

DIGESTS = FOLDER / "digests.txt"


def shipped_cases():
    files = (json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json")))
    return {case["id"]: case for family in files for case in family}


def test_114_cases_ship_and_every_family_file_loads():
    assert len(shipped_cases()) == 114
    assert sum(len(load(path.stem)) for path in FOLDER.glob("*.json")) == 114


def test_no_case_is_missing_or_changed():
    expected = dict(reversed(line.split()) for line in DIGESTS.read_text().splitlines())
    found = {
        name: hashlib.sha256(json.dumps(case, sort_keys=True).encode()).hexdigest()
        for name, case in shipped_cases().items()
    }
    assert found == expected

"""What timed chunks say about the numbers that the profile of a device assumes."""

from __future__ import annotations

from typing import Any

from chunkflow_cli.planning.calibration import OperationSample, fit_costs
from gpu_proof.cases import Section

Row = dict[str, Any]


def derived_rows(section: Section, seconds: list[Row]) -> list[Row]:
    """Return the rows of the section "profile" from those of "seconds": the profile's share times how far it is off."""
    measured = [row["values"] for row in seconds if "operations" in row["values"]]
    operations = [OperationSample(**operation) for values in measured for operation in values["operations"]]
    try:
        fitted, worst = fit_costs(operations, step_seconds=0.0, source="")
    except ValueError as error:
        return [{"status": "not run", "note": str(error), "values": {}} for _ in section.cases]
    profile = measured[0]["profile"]
    rows = []
    for case in section.cases:
        assumed = profile[case.facts["assumed"]] if case.facts["assumed"] else 1.0
        values = {"assumed": assumed, "worst_error_of_fit": worst}
        for kind in ("forward", "backward"):
            coefficient = getattr(getattr(fitted, kind), case.facts["coefficient"])
            expected = profile[kind][case.facts["coefficient"]]
            if case.facts["assumed"] is None:
                values[kind] = coefficient / expected
            elif coefficient > 0:  # the fit may leave a column out
                values[kind] = assumed * expected / coefficient
        rows.append({"status": "measured", "values": values})
    return rows

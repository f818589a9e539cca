"""Code of a user, read and not run, in which mypy finds on each line with a comment the error that it names."""

import distill
import interventions


def use() -> None:
    print(distill.fitt)  # attr-defined
    distill.fit(None, None, steps="two")  # arg-type
    distill.KD(temperature="warm")  # arg-type
    interventions.Location(layer="third")  # arg-type
    interventions.describe()  # call-arg
    interventions.metrics.kll()  # attr-defined
    version: int = interventions.__version__  # assignment
    print(version)

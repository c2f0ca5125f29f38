"""`alignpro doctor`: what is installed, what works on this machine, and why the rest does not.

`diagnosis` runs the probes, each of which is in a file named after what it checks, and prints their `findings`. The
requirements are read from the package's own metadata, so they never disagree with pyproject.toml. Nothing here raises
because a package or a tool is missing or broken: its purpose is to report that. So all that a probe imports, it imports
where it is used. May import everything but `cli`.
"""

from alignpro.doctor.diagnosis import diagnose, print_diagnosis
from alignpro.doctor.findings import Finding

__all__ = ["Finding", "diagnose", "print_diagnosis"]

"""`python -m pyjlode` is the command `pyjlode`."""

from .tools.cli import main

raise SystemExit(main())

"""`python -m pyjlode` is the command `pyjlode`."""

from .cli import main

raise SystemExit(main())

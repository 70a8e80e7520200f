"""The command line: `pyjlode demo`, `pyjlode setup`, `pyjlode doctor`."""

"""The Julia engine: DifferentialEquations.jl and SciMLSensitivity.jl in the same process, through juliacall."""

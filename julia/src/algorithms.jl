# Algorithms by the text that names them.

# Parsed in a module of its own that has what SciML exports, and nothing of ours.
module Names
using ADTypes, LinearAlgebra, LinearSolve
using OrdinaryDiffEqBDF, OrdinaryDiffEqCore, OrdinaryDiffEqDefault, OrdinaryDiffEqFIRK, OrdinaryDiffEqHighOrderRK
using OrdinaryDiffEqLowOrderRK, OrdinaryDiffEqRosenbrock, OrdinaryDiffEqSDIRK, OrdinaryDiffEqTsit5, OrdinaryDiffEqVerner
end

const ALGORITHMS = Dict{String, Any}()

"""
    algorithm(text)

The algorithm that a Julia expression such as `"Tsit5()"` or `"KenCarp4(linsolve = KrylovJL_GMRES())"` makes.
"""
algorithm(text::AbstractString) = get!(() -> Core.eval(Names, Meta.parse(text)), ALGORITHMS, String(text))

"Whether an algorithm chooses its steps itself, and whether it solves equations with the Jacobian."
traits(alg) = (isadaptive(alg), isimplicit(alg))

"The adjoints of SciMLSensitivity, fed with the field's own vector-Jacobian products."
module PyJLODESciMLSensitivityExt

using ADTypes: AutoFiniteDiff
using CommonSolve: CommonSolve, init, solve!
using ConstructionBase: setproperties
using OrdinaryDiffEqCore: CompositeAlgorithm, isimplicit
using PrecompileTools: @compile_workload, @setup_workload
using PyJLODE: PyJLODE, AdjointRequest, Field, IMPLICIT, Outcome, Solve, Source, adjoint_linear, beside, borrow,
    ode_function, solve_linear, stepping, succeeded, tolerance, vectors
using SciMLBase: ODEProblem, SciMLBase, remake
using SciMLSensitivity: BacksolveAdjoint, GaussAdjoint, InterpolatingAdjoint, QuadratureAdjoint,
    ReverseDiffVJP, adjoint_sensitivities

# GaussKronrodAdjoint is not among them: where its fixed absolute tolerance of 1e-7 is out of reach (in float32, or of a
# large gradient) it halves steps without end, until the stack of the process is full.
const METHODS = Dict(
    "interpolating" => InterpolatingAdjoint,
    "gauss" => GaussAdjoint,
    "quadrature" => QuadratureAdjoint,
    "backsolve" => BacksolveAdjoint,
)

# A field has its own products, and nothing is differentiated here; source code is.
products(::Field) = (; autojacvec = false, autodiff = false)
products(::Source) = (; autojacvec = ReverseDiffVJP())

"""
The solver of an adjoint: one that differences. The products of a field are C functions, which cannot be differentiated
by dual numbers; what is left to a difference is the adjoint's derivative by time, and for "interpolating" the Jacobian.
"""
backward_solver(alg, ::Source) = alg
backward_solver(alg::CompositeAlgorithm, field::Field) =
    CompositeAlgorithm(map(a -> backward_solver(a, field), alg.algs), alg.choice_function)
backward_solver(alg, ::Field) = hasproperty(alg, :autodiff) ? remake(alg; autodiff = AutoFiniteDiff()) : alg

"""
The forward solution as an implicit solver of the adjoint has use for it: SciMLSensitivity takes the field's own Jacobian
where it is told what a Jacobian looks like.
"""
function with_jacobian(s::Solve{T, <:Field}) where {T}
    (; prob) = s.sol
    (; mass_matrix) = prob.f
    f = ode_function(s.field; mass_matrix, jac_prototype = beside(s.field.parameters, zeros(T, s.field.n, s.field.n)))
    return setproperties(s.sol, (; prob = remake(prob; f)))
end
with_jacobian(s::Solve) = s.sol

function adjoint_method(name, field, reltol, abstol)
    tolerances = name == "quadrature" ? (; reltol, abstol) : (;)
    return METHODS[name](; products(field)..., tolerances...)
end

"""
A tolerance, one number or one for each of the state, for what an adjoint solves for: with the gradient by `m` parameters,
and the state, or without.
"""
adjoint_tolerance(name, tol::Number, m) = tol
function adjoint_tolerance(name, tol::Vector, m)
    name == "quadrature" && return minimum(tol)
    name == "gauss" && return tol
    parts = [tol; fill(minimum(tol), m)]
    return name == "backsolve" ? [parts; tol] : parts
end

"A solver for SciMLSensitivity, which goes on with whatever comes out: a solve that fails ends it here."
struct Watched{A}
    alg::A
    outcome::Base.RefValue{Outcome}
end

struct Failed <: Exception end

SciMLBase.forwarddiffs_model(w::Watched) = SciMLBase.forwarddiffs_model(w.alg)
SciMLBase.forwarddiffs_model_time(w::Watched) = SciMLBase.forwarddiffs_model_time(w.alg)

function CommonSolve.solve(problem::ODEProblem, w::Watched; kwargs...)
    integrator = init(problem, w.alg; kwargs...)
    sol = solve!(integrator)
    w.outcome[] = Outcome(sol, integrator, integrator.u, NaN, 1)
    succeeded(w.outcome[]) || throw(Failed())
    return sol
end

function PyJLODE.adjoint!(s::Solve{T}, name::String, alg, r::AdjointRequest) where {T}
    times = Vector{Float64}(r.times)
    V = vectors(s.field)
    cotangents = reshape(borrow(V, r.g), s.field.n, length(times))
    function dgdu(out, u, p, t, i)
        copyto!(out, view(cotangents, :, i + 1))
        return nothing
    end
    m = length(s.field.parameters)
    reltol, abstol = adjoint_tolerance(name, tolerance(r.rtol), m), adjoint_tolerance(name, tolerance(r.atol), m)
    # What solves the state backward begins anew from the forward solution at each output, and so must stop there.
    restarts = name == "backsolve" ? times : Float64[]
    checkpoints = name == "backsolve" ? (; checkpoints = times) : (;)
    solver = Watched(backward_solver(alg, s.field), Ref{Outcome}())
    steps = stepping(solver.alg, r, sign(times[1] - times[end]), abs(times[end] - times[1]))
    du0, dp = try
        adjoint_sensitivities(
            isimplicit(alg) ? with_jacobian(s) : s.sol, solver;
            t = times[2:end], dgdu_discrete = dgdu, sensealg = adjoint_method(name, s.field, reltol, abstol),
            reltol = beside(s.field.parameters, reltol), abstol = beside(s.field.parameters, abstol), tstops = [restarts; Vector{Float64}(r.stops)], verbose = PyJLODE.SILENT, steps...,
            checkpoints...
        )
    catch error
        error isa Failed ? (return solver.outcome[]) : rethrow()
    end
    copyto!(borrow(V, r.du0), vec(du0))
    m == 0 || copyto!(borrow(V, r.dp), vec(dp))
    return solver.outcome[]
end

@setup_workload begin
    @compile_workload begin
        for text in ("Tsit5()", "DP5()"), name in ("interpolating", "gauss"), T in (Float32, Float64)
            adjoint_linear(T, name, text)
        end
        for text in ("Rodas5P()", "RadauIIA5()")
            adjoint_linear(Float64, "gauss", text)
        end
        # Loading SciMLSensitivity invalidates what was compiled for these.
        for text in IMPLICIT
            solve_linear(Float64, text; dense = true)
        end
    end
end

end

"The adjoints of SciMLSensitivity, fed with the field's own vector-Jacobian products."
module PyJLODESciMLSensitivityExt

using PrecompileTools: @compile_workload, @setup_workload
using PyJLODE: PyJLODE, Borrowed, Solve, algorithm, borrowed, solve_linear, tolerance
using SciMLSensitivity: BacksolveAdjoint, GaussAdjoint, GaussKronrodAdjoint, InterpolatingAdjoint, QuadratureAdjoint,
    adjoint_sensitivities

# The products are the field's: nothing is differentiated here.
const METHODS = Dict(
    "interpolating" => (rtol, atol) -> InterpolatingAdjoint(; autojacvec = false, autodiff = false),
    "gauss" => (rtol, atol) -> GaussAdjoint(; autojacvec = false, autodiff = false),
    "gauss_kronrod" => (rtol, atol) -> GaussKronrodAdjoint(; autojacvec = false, autodiff = false),
    "quadrature" =>
        (rtol, atol) -> QuadratureAdjoint(; autojacvec = false, autodiff = false, reltol = rtol, abstol = atol),
    "backsolve" => (rtol, atol) -> BacksolveAdjoint(; autojacvec = false, autodiff = false),
)

function PyJLODE.adjoint!(
        du0::Borrowed{T}, dp::Borrowed{T}, s::Solve{T}, name::String, alg, times::Borrowed{Float64}, g::Borrowed{T};
        rtol, atol, max_steps::Int = 100_000
    ) where {T}
    cotangents = reshape(g.array, s.field.n, length(times.array))
    function dgdu(out, u, p, t, i)
        copyto!(out, view(cotangents, :, i + 1))
        return nothing
    end
    reltol, abstol = tolerance(rtol), tolerance(atol)
    method = METHODS[name](minimum(reltol), minimum(abstol))
    ts = times.array[2:end]
    a, b = adjoint_sensitivities(
        s.sol, alg; t = ts, dgdu_discrete = dgdu, sensealg = method, reltol, abstol, maxiters = max_steps,
        checkpoints = times.array, verbose = PyJLODE.SILENT
    )
    copyto!(du0.array, a)
    isempty(dp.array) || copyto!(dp.array, b)
    return nothing
end

@setup_workload begin
    @compile_workload begin
        for (T, name) in ((Float64, "interpolating"), (Float64, "gauss"), (Float32, "interpolating")), text in ("Tsit5()", "DP5()")
            alg = algorithm(text)
            s, _, times, out = solve_linear(T, alg; dense = true)
            PyJLODE.adjoint!(
                borrowed(zeros(T, 1)), borrowed(zeros(T, 1)), s, name, alg, borrowed(times), borrowed(copy(out));
                rtol = 1.0e-4, atol = 1.0e-6
            )
        end
    end
end

end

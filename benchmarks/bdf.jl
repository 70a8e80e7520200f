# Julia's FBDF and QNDF by themselves on van der Pol's oscillator, with its Jacobian: how far each gets, and why `bdf`
# is QNDF on the Julia engine.
#
#     julia --project=... benchmarks/bdf.jl
#
# Both are OrdinaryDiffEqBDF's, with its own norm and step control; nothing of PyJLODE is loaded. The end is that of the
# Test Set for IVP Solvers (eps = 1e-6), and one of radau5 at 1e-12 (mu = 1e5).

using OrdinaryDiffEqBDF, OrdinaryDiffEqCore, SciMLBase

function scaled!(du, u, eps, t)
    du[1], du[2] = u[2], ((1 - u[1]^2) * u[2] - u[1]) / eps
    return nothing
end
function scaled_jacobian!(J, u, eps, t)
    J .= [0 1; (-2u[1] * u[2] - 1) / eps (1 - u[1]^2) / eps]
    return nothing
end
function long!(du, u, mu, t)
    du[1], du[2] = u[2], mu * (1 - u[1]^2) * u[2] - u[1]
    return nothing
end
function long_jacobian!(J, u, mu, t)
    J .= [0 1; -2mu * u[1] * u[2] - 1 mu * (1 - u[1]^2)]
    return nothing
end

field(f, jac) = ODEFunction{true, SciMLBase.FullSpecialize}(f; jac)
problems = (
    ("eps = 1e-6", ODEProblem(field(scaled!, scaled_jacobian!), [2.0, 0.0], (0.0, 2.0), 1.0e-6), 1.0, 1.706167732170469),
    ("mu = 1e5", ODEProblem(field(long!, long_jacobian!), [2.0, 0.0], (0.0, 1.0e5), 1.0e5), 1.0e-5, -1.8633844657157572),
)
for (name, problem, part, last) in problems, tol in (1.0e-4, 1.0e-6, 1.0e-8, 1.0e-9, 1.0e-10)
    for (label, alg) in (("FBDF", FBDF()), ("QNDF", QNDF()))
        s = solve(problem, alg; reltol = tol, abstol = part * tol, maxiters = 10^6, save_everystep = false)
        println("$name, $tol, $label: $(s.retcode) at t=$(s.t[end]), $(s.stats.naccept) steps, error $(abs(s.u[end][1] - last))")
    end
end

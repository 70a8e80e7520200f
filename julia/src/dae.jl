# The adjoint of systems M y' = f(t, y), by the equations of Cao, Li, Petzold & Serban, Adjoint sensitivity analysis for
# differential-algebraic equations, SIAM J. Sci. Comput. 24 (2003) 1076-1089, Sec. 2 and 3.

"""
The algebraic equations of a system of index 1, of which `N` and `V`, bases of the left and right null space of `M`, are
those that M is silent in, and the changes of y that it does not see. None where M is regular.
"""
struct Algebra{T}
    M::Matrix{T}
    N::Matrix{T}
    V::Matrix{T}
end

function Algebra(M::Matrix{T}) where {T}
    U, sizes, W = svd(M; full = true)
    rank = count(>(size(M, 1) * eps(T) * maximum(sizes; init = zero(T))), sizes)
    return Algebra{T}(M, U[:, (rank + 1):end], W[:, (rank + 1):end])
end

"""
The adjoint where it gets the cotangent `a` of the state: λ with Mᵀ λ = a - Jᵀ μ and Vᵀ Jᵀ λ = 0; and μ, by which the
algebraic equations carry over to the rest what `a` has along V. What μ adds to the gradient by the parameters, -μ ∂f/∂p,
is the boundary term that an integral of λ ∂f/∂p alone leaves out.
"""
function adjoint_start(algebra::Algebra, J, a)
    (; M, N, V) = algebra
    isempty(N) && return M' \ a, zero(a)
    mu = N * ((N' * J * V)' \ (V' * a))
    return [M'; V' * J'] \ [a - J' * mu; zeros(eltype(a), size(V, 2))], mu
end

"The derivative of the solution: M y' = f and Nᵀ (J y' + ∂f/∂t) = 0."
slope(algebra::Algebra, J, f, rate) = [algebra.M; algebra.N' * J] \ [f; -algebra.N' * rate]

"The right-hand side of the adjoint equation Mᵀ λ' = -Jᵀ λ along a solution, with room for the state."
struct AlongSolution{T, F, S}
    field::F
    sol::S
    y::Vector{T}
    J::Matrix{T}
end

"The state at a time."
at!(a::AlongSolution, t) = (a.sol(a.y, t); a.y)

function (a::AlongSolution)(out, v, p, t)
    VJP(a.field)(out, v, at!(a, t), p, t)
    out .*= -1
    return nothing
end

"Minus the transposed Jacobian of the field."
struct AdjointJacobian{A <: AlongSolution}
    along::A
end

function (j::AdjointJacobian)(out, v, p, t)
    (; along) = j
    out .= .-transpose(jacobian!(along, p, t))
    return nothing
end

jacobian!(a::AlongSolution, p, t) = (Jacobian(a.field)(a.J, at!(a, t), p, t); a.J)

"The derivative by time, by a difference that stays between the ends."
struct AdjointRate{A <: AlongSolution, T}
    along::A
    ends::NTuple{2, Float64}
    before::Vector{T}
end

function (r::AdjointRate)(out, v, p, t)
    first, last = minmax(r.ends...)
    step = cbrt(eps()) * max(last - first, eps() * abs(t))
    a, b = max(first, t - step), min(last, t + step)
    r.along(r.before, v, p, a)
    r.along(out, v, p, b)
    out .= (out .- r.before) ./ (b - a)
    return nothing
end

const InPlaceAdjoint = Union{AlongSolution, AdjointJacobian, AdjointRate}
SciMLBase.isinplace(::InPlaceAdjoint, ::Integer, name = "f", preferred = true; kwargs...) = true

"Nodes and weights of Gauss quadrature with `m` points on [0, 1] (Golub & Welsch, Math. Comp. 23, 1969)."
function gauss(m)
    off = [k / sqrt(4k^2 - 1) for k in 1:(m - 1)]
    nodes, vectors = eigen(SymTridiagonal(zeros(m), off))
    return (nodes .+ 1) ./ 2, vectors[1, :] .^ 2
end

"""
Adds, after each step of the adjoint, its part of the integral of λ ∂f/∂p; and of -λ y'ᵀ, which is that of the gradient by
the mass matrix, where there is room for it.
"""
struct Integral{T, A <: AlongSolution}
    along::A
    algebra::Algebra{T}
    nodes::Vector{Float64}
    weights::Vector{Float64}
    v::Vector{T}
    by_p::Vector{T}
    dp::Vector{T}
    dM::Matrix{T}
end

function (i::Integral)(integrator)
    u_modified!(integrator, false)
    (; t, tprev) = integrator
    for (node, weight) in zip(i.nodes, i.weights)
        time = tprev + node * (t - tprev)
        integrator(i.v, time)
        add!(i, i.v, time, weight * (tprev - t), integrator.p)
    end
    return nothing
end

"Adds `scale` times what a multiplier `v` of the equations at time `t` gives."
function add!(i::Integral, v, t, scale, p)
    (; field) = i.along
    y = at!(i.along, t)
    if !isempty(i.dp)
        ParameterVJP(field)(i.by_p, v, y, p, t)
        i.dp .+= scale .* i.by_p
    end
    isempty(i.dM) || (i.dM .-= scale .* v .* slope(i, t, p)')
    return nothing
end

function slope(i::Integral, t, p)
    (; field) = i.along
    J, y = jacobian!(i.along, p, t), i.along.y
    f, rate = similar(y), similar(y)
    RHS(field)(f, y, p, t)
    TimeGradient(field)(rate, y, p, t)
    return slope(i.algebra, J, f, rate)
end

"Whether a solve was of a system with a mass matrix, or of one that was posed as such."
of_mass(s::Solve) = !(mass_matrix(s.sol.prob.f) isa UniformScaling)

mass_matrix(f::ODEFunction) = f.mass_matrix
mass_matrix(f::DAEFunction) = f.f.M

"""
    mass_adjoint!(solve, alg, request) -> Outcome

As [`adjoint!`](@ref), of a system with a mass matrix: from output to output, with what is algebraic in a cotangent carried
over at each. `dp` may have room for the gradient by the mass matrix behind that by the parameters, in column-major order,
and `slopes` for the derivative of the state at each time.
"""
function mass_adjoint!(s::Solve{T, <:Field{T, Vector{T}}}, alg, r::AdjointRequest) where {T}
    (; field) = s
    n, p = field.n, field.parameters
    times = Vector{Float64}(r.times)
    cotangents = reshape(Vector{T}(r.g), n, length(times))
    dp, slopes = Vector{T}(r.dp), reshape(Vector{T}(r.slopes), n, :)
    fill!(dp, zero(T))
    algebra = Algebra(Matrix{T}(mass_matrix(s.sol.prob.f)))
    along = AlongSolution{T, typeof(field), typeof(s.sol)}(field, s.sol, zeros(T, n), zeros(T, n, n))
    by_mass = length(dp) > length(p)
    nodes, weights = gauss(cld(OrdinaryDiffEqCore.alg_order(alg), 2) + 1)
    integral = Integral(
        along, algebra, nodes, weights, zeros(T, n), similar(p), view(dp, 1:length(p)) |> collect,
        zeros(T, by_mass ? n : 0, by_mass ? n : 0)
    )
    for (k, column) in enumerate(eachcol(slopes))
        column .= slope(integral, times[k], p)
    end
    a, outcome = zeros(T, n), nothing
    for k in length(times):-1:2
        a .+= view(cotangents, :, k)
        v, mu = adjoint_start(algebra, jacobian!(along, p, times[k]), a)
        add!(integral, mu, times[k], -one(T), p)
        v, o = back!(integral, v, alg, r, times[k], times[k - 1], p)
        outcome = outcome === nothing ? o : together(outcome, o)
        succeeded(outcome) || return outcome
        a = algebra.M' * v
    end
    copyto!(Vector{T}(r.du0), a)
    copyto!(dp, [integral.dp; vec(integral.dM)])
    return outcome
end

"The adjoint from one output to the one before, and how that went."
function back!(integral::Integral{T}, v, alg, r, t1, t0, p) where {T}
    (; along, algebra) = integral
    n = length(v)
    f = ODEFunction{true, FullSpecialize}(
        along; mass_matrix = Matrix(algebra.M'), jac = AdjointJacobian(along),
        tgrad = AdjointRate(along, (t0, t1), zeros(T, n)), jac_prototype = zeros(T, n, n)
    )
    stops = filter(t -> min(t0, t1) < t < max(t0, t1), [Vector{Float64}(r.stops); Vector{Float64}(r.jumps)])
    integrator = init(
        ODEProblem(f, v, (t1, t0), p), alg;
        reltol = tolerance(r.rtol), abstol = tolerance(r.atol), save_everystep = false, save_start = false, dense = false,
        calck = true, tstops = stops, initializealg = NoInit(), verbose = SILENT,
        callback = DiscreteCallback(Always(), integral; save_positions = (false, false)),
        stepping(alg, r, sign(t0 - t1), abs(t1 - t0))..., d_discontinuities = Float64[]
    )
    sol = solve!(integrator)
    return integrator.u, Outcome(sol, integrator, integrator.u, NaN, 1)
end

struct Always end
(::Always)(u, t, integrator) = true

# Algorithms for fully implicit systems F(t, y, y') = 0, of which F is M y' - f(t, y) here.

"F(t, y, y'), with room for f."
struct Residual{F, T}
    field::F
    M::Matrix{T}
    f::Vector{T}
end

# Where an algorithm differentiates the field itself, f is of other numbers than T.
room(r::Residual{<:Field}, out) = r.f
room(::Residual, out) = similar(out)

function (r::Residual)(out, dy, y, p, t)
    f = room(r, out)
    right(r.field)(f, y, p, t)
    mul!(out, r.M, dy)
    out .-= f
    return nothing
end

right(field::Field) = RHS(field)
right(field::Source) = field.f

slope!(r::DAEFunction{true, S, <:Residual}, slope, u, p, t) where {S} = right(r.f.field)(slope, u, p, t)

"gamma dF/dy' + dF/dy."
struct ResidualJacobian{R <: Residual}
    residual::R
end

function (j::ResidualJacobian)(J, dy, y, p, gamma, t)
    (; field, M) = j.residual
    Jacobian(field)(J, y, p, t)
    J .= gamma .* M .- J
    return nothing
end

SciMLBase.isinplace(::Union{Residual, ResidualJacobian}, ::Integer, name = "f", preferred = true; kwargs...) = true

function posed(::SciMLBase.AbstractDAEAlgorithm, field, mass, u0::Vector{T}, span, full) where {T}
    M = mass isa UniformScaling ? Matrix{T}(mass, length(u0), length(u0)) : mass
    residual = Residual(field, M, similar(u0))
    f = DAEFunction{true, FullSpecialize}(residual; derivatives(residual)...)
    return DAEProblem(f, first_slope(residual, u0, span[1]), u0, span, field.parameters)
end

# What OrdinaryDiffEqCore 4.5 chooses, which is of the wrong sign backward in time.
function first_dt(::SciMLBase.AbstractDAEAlgorithm, direction, longest)
    return (; dt = direction * 1.0e-6 * (isfinite(longest) ? longest : 1.0))
end

derivatives(r::Residual{<:Field}) = (; jac = ResidualJacobian(r))
derivatives(::Residual) = (;)

"The derivative of the state at the start."
function first_slope(r::Residual{<:Field}, u0, t)
    (; field, M) = r
    p, J, f, rate = field.parameters, zero(M), similar(u0), similar(u0)
    Jacobian(field)(J, u0, p, t)
    TimeGradient(field)(rate, u0, p, t)
    RHS(field)(f, u0, p, t)
    return slope(Algebra(M), J, f, rate)
end

# That of the algebraic components, which no step depends on, is not looked for.
first_slope(r::Residual, u0, t) = (f = similar(u0); right(r.field)(f, u0, r.field.parameters, t); pinv(r.M) * f)

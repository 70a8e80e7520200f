# Fields of which one part is solved implicitly and the other explicitly, by the additive methods of OrdinaryDiffEqSDIRK.

"""
    Parts(stiff, other, event)

The field `stiff + other`. `parameters` has room for those of both, one after the other: each part knows its own.
"""
struct Parts{T, V <: AbstractVector{T}}
    n::Int
    stiff::Field{T, V}
    other::Field{T, V}
    event::Ptr{Cvoid}
    parameters::V
end

Parts(stiff::F, other::F, event = C_NULL) where {F <: Field} =
    Parts(stiff.n, stiff, other, event, vcat(zero(stiff.parameters), zero(other.parameters)))

vectors(::Parts{T, V}) where {T, V} = V
prepare!(p::Parts) = (prepare!(p.stiff); prepare!(p.other))

# Out of place: in place, OrdinaryDiffEqSDIRK 2.7 takes the whole field as the stiff part in the first stage of a step that
# follows on one whose equations were not solved, which then has another error than its estimate says.

"The value of a part."
struct Value{F <: Field}
    field::F
end
(x::Value)(u, p, t) = (du = similar(u); RHS(x.field)(du, u, x.field.parameters, t); du)

"Its Jacobian."
struct ValueJacobian{F <: Field}
    field::F
end
(x::ValueJacobian)(u, p, t) = (J = similar(u, length(u), length(u)); Jacobian(x.field)(J, u, x.field.parameters, t); J)

SciMLBase.isinplace(::Union{Value, ValueJacobian}, ::Integer, name = "f", preferred = true; kwargs...) = false

function posed(alg, field::Parts, mass, u0, span, full)
    stiff = ODEFunction{false, FullSpecialize}(Value(field.stiff); jac = ValueJacobian(field.stiff))
    other = ODEFunction{false, FullSpecialize}(Value(field.other))
    return ODEProblem(SplitFunction{false, FullSpecialize}(stiff, other), u0, span, field.parameters)
end

slope!(f::SplitFunction, slope, u, p, t) = copyto!(slope, f(u, p, t))

# The discrete adjoint of such steps, whose stages are solved for again to rounding.

"""
An additive Runge-Kutta method of `s` stages, the first of which is explicit and the last of which has the weights of the
step: `a[j, l]` is the weight of the stiff part's slope j in stage l, and `x[j, l]` that of the other part's. Between the
ends of a step the state is the cubic through these and their slopes.

  - `points`, `stiff`, `other`: the states of the stages, and the slopes of both parts there; behind them the end of the
    step.
  - `stiff_bars`, `other_bars`: the cotangents of these slopes.
"""
struct AdditiveReplay{T}
    a::Matrix{T}
    x::Matrix{T}
    c::Vector{Float64}
    points::Vector{Vector{T}}
    stiff::Vector{Vector{T}}
    other::Vector{Vector{T}}
    stiff_bars::Vector{Vector{T}}
    other_bars::Vector{Vector{T}}
    J::Matrix{T}
    by_point::Vector{T}
    by_stiff::Vector{T}  # parameters
    by_other::Vector{T}
end

function scratch(field::Parts{T, Vector{T}}, r::ReplayRequest, a, theta) where {T}
    (; n, stiff, other) = field
    s = r.stages
    weights = T.(reshape(Vector{Float64}(r.a), s, s, 2))
    room() = [zeros(T, n) for _ in 1:(s + 1)]
    return AdditiveReplay{T}(
        weights[:, :, 1], weights[:, :, 2], [copy(Vector{Float64}(r.c)); 1.0], room(), room(), room(), room(), room(),
        zeros(T, n, n), zeros(T, n), zero(stiff.parameters), zero(other.parameters)
    )
end

stages(w::AdditiveReplay) = size(w.a, 1)
reached(w::AdditiveReplay) = w.points[end]

"I - dt gamma J, as its factors, of the stiff part's Jacobian at a point."
function iteration_matrix(w::AdditiveReplay{T}, field, dt, point, t) where {T}
    Jacobian(field.stiff)(w.J, point, field.stiff.parameters, t)
    return lu!(Matrix{T}(I, size(w.J)) .- (T(dt) * w.a[end, end]) .* w.J; check = false)
end

"The slope of a part at a point."
slope!(part::Field, slope, point, t) = RHS(part)(slope, point, part.parameters, t)

function step!(w::AdditiveReplay{T}, field, t0, dt, y, dense) where {T}
    (; a, x, c, points, stiff, other) = w
    s, h = stages(w), T(dt)
    copyto!(points[1], y)
    slope!(field.stiff, stiff[1], y, t0)
    slope!(field.other, other[1], y, t0)
    W, calls = iteration_matrix(w, field, dt, y, t0), 1
    base = zero(y)
    for l in 2:s
        copyto!(base, y)
        for j in 1:(l - 1)
            add!(base, h * a[j, l], stiff[j])
            add!(base, h * x[j, l], other[j])
        end
        W, count = solve_stage!(w, field, W, l, t0 + c[l] * dt, dt, base, y)
        slope!(field.other, other[l], points[l], t0 + c[l] * dt)
        calls += count
    end
    copyto!(points[s + 1], y)
    for j in 1:s
        add!(points[s + 1], h * a[j, s], stiff[j])
        add!(points[s + 1], h * a[j, s], other[j])
    end
    return calls
end

"Most iterations for a stage, which the solve itself needed but a few for."
const MOST_ITERATIONS = 30

"""
Solve k = f(t, base + dt gamma k) for the slope k of the stiff part in stage l, by Newton's iteration: with the factors W
as long as these are good, and those of the point at hand where they are not. Returns the last ones, and the calls of the
field.
"""
function solve_stage!(w::AdditiveReplay{T}, field, W, l, t, dt, base, y) where {T}
    point, k, size = w.points[l], copyto!(w.stiff[l], w.stiff[l - 1]), maximum(abs, y; init = zero(T))
    hg, before, change = T(dt) * w.a[end, end], T(Inf), similar(k)
    for i in 1:MOST_ITERATIONS
        point .= base .+ hg .* k
        slope!(field.stiff, change, point, t)
        change .-= k
        ldiv!(W, change)
        k .+= change
        far, near = abs(hg) * maximum(abs, change; init = zero(T)), 8eps(T) * max(size, maximum(abs, point; init = zero(T)))
        # Where it comes no nearer, rounding holds it up.
        if far <= near || (far <= 1000near && far >= before / 2)
            point .= base .+ hg .* k
            return W, i
        end
        far > before / 10 && (W = iteration_matrix(w, field, dt, point, t))
        before = far
    end
    error("the equations of a step at t = $t, which is taken again for its gradient, were not solved")
end

"As of explicit methods."
function pull!(w::AdditiveReplay{T}, field, a, theta, t0, dt, times, g) where {T}
    (; points, stiff_bars, other_bars, by_stiff, by_other) = w
    s, h, m = stages(w), T(dt), length(by_stiff)
    of_stiff, of_other = view(theta, 1:m), view(theta, (m + 1):length(theta))
    foreach(bar -> fill!(bar, zero(T)), stiff_bars)
    foreach(bar -> fill!(bar, zero(T)), other_bars)
    by_start, base_bar = zero(a), zero(a)
    # Adds the products of a part at stage l to `to`, and to the gradient by its parameters.
    function product!(to, part, by_part, of_part, bar, l)
        nothing_in(bar) && return nothing
        products!(w.by_point, w.by_point, by_part, part, bar, points[l], t0 + w.c[l] * dt)
        to .+= w.by_point
        of_part .+= by_part
        return nothing
    end
    function both!(to, l)
        product!(to, field.stiff, by_stiff, of_stiff, stiff_bars[l], l)
        product!(to, field.other, by_other, of_other, other_bars[l], l)
        return nothing
    end
    for (time, bar) in zip(times, eachcol(g))
        part = (time - t0) / dt
        of_end = part^2 * (3 - 2part)
        add!(by_start, T(1 - of_end), bar)
        add!(a, T(of_end), bar)
        for bars in (stiff_bars, other_bars)
            add!(bars[1], T(dt * part * (part - 1)^2), bar)
            add!(bars[s + 1], T(dt * part^2 * (part - 1)), bar)
        end
    end
    both!(a, s + 1)  # the slope at the end
    by_start .+= a
    for l in 1:s, bars in (stiff_bars, other_bars)
        add!(bars[l], h * w.a[l, s], a)
    end
    for l in s:-1:2
        fill!(base_bar, zero(T))
        product!(base_bar, field.other, by_other, of_other, other_bars[l], l)
        # k = f(base + h gamma k) is the stage's slope, and base + h gamma k its state.
        add!(stiff_bars[l], h * w.a[s, s], base_bar)
        ldiv!(transpose(iteration_matrix(w, field, dt, points[l], t0 + w.c[l] * dt)), stiff_bars[l])
        product!(base_bar, field.stiff, by_stiff, of_stiff, stiff_bars[l], l)
        by_start .+= base_bar
        for j in 1:(l - 1)
            add!(stiff_bars[j], h * w.a[j, l], base_bar)
            add!(other_bars[j], h * w.x[j, l], base_bar)
        end
    end
    both!(by_start, 1)
    copyto!(a, by_start)
    return nothing
end

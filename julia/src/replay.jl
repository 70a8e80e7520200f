# The discrete adjoint of explicit Runge-Kutta methods: each accepted step is taken again, the last one first, and the
# cotangent pulled back through it. What comes out is the gradient of the numbers that the solve gave.

"""
The ends of the accepted steps of a solve, from its start on: their times, and the states there, one after the other; or
some of these at `points`, and no others.
"""
struct Steps{S}
    times::Vector{Float64}
    states::S
    points::Union{Nothing, Checkpoints}
end
Steps{S}(points = nothing) where {S} = Steps{S}(Float64[], S(), points)

# The host's lie in one vector, one after the other.
steps_type(::Type{Vector{T}}) where {T} = Steps{Vector{T}}
steps_type(::Type{V}) where {V <: AbstractVector} = Steps{Vector{V}}

"Room for the steps of a solve like another."
function like(steps::Steps{Vector{T}}) where {T <: Number}
    return Steps{Vector{T}}(
        sizehint!(Float64[], length(steps.times)), sizehint!(T[], length(steps.states)), like(steps.points)
    )
end

function note!(steps::Steps, u, t)
    i = length(steps.times)
    push!(steps.times, t)
    steps.points === nothing ? put!(steps.states, u) : place!(steps.points, i, u, slots(i))
    return nothing
end
note!(::Nothing, u, t) = nothing
put!(states::Vector{<:Number}, u) = append!(states, u)
put!(states::Vector{<:AbstractVector}, u) = push!(states, copy(u))

"State k, of n numbers."
state(states::Vector{<:Number}, n, k) = view(states, ((k - 1) * n + 1):(k * n))
state(states::Vector{<:AbstractVector}, n, k) = states[k]

"""
An explicit Runge-Kutta method with dense output. Stage `l` of a step of size `dt` from `(t, y)` is the slope at the time
`t + c[l] dt` and the state `y + dt (k a[:, l])`, `k` the stages before it. Stage `s + 1` is at the end of the step, and
those after it are there for the dense output `y(t + θ dt) = y + dt (k p') (θ, θ², ...)`.
"""
struct Tableau{T}
    s::Int
    a::Matrix{T}
    c::Vector{Float64}
    p::Matrix{Float64}
end

function Tableau{T}(r::ReplayRequest) where {T}
    c = copy(Vector{Float64}(r.c))
    a = reshape(Vector{Float64}(r.a), length(c), length(c))
    return Tableau{T}(r.stages, T.(a), c, copy(reshape(Vector{Float64}(r.p), :, length(c))))
end

"Whether it is the method of a request."
function is_of(tab::Tableau{T}, r::ReplayRequest) where {T}
    r.stages == tab.s && r.c.length == length(tab.c) && r.p.length == length(tab.p) || return false
    a, c, p = Vector{Float64}(r.a), Vector{Float64}(r.c), Vector{Float64}(r.p)
    return c == tab.c && all(i -> T(a[i]) == tab.a[i], eachindex(a)) && all(i -> p[i] == tab.p[i], eachindex(p))
end

"What a replay works with: for each stage its point, its slope and the cotangent of that."
struct Replay{T, V}
    tab::Tableau{T}
    points::Vector{V}
    slopes::Vector{V}
    bars::Vector{V}
    by_start::V
    by_both::V  # by the point, and then by the parameters, and room behind that
end

function Replay(tab::Tableau{T}, a::V, theta::V, room) where {T, V}
    # Vectors, and no matrix: a field may show its callbacks vectors themselves.
    points, slopes, bars = (V[zero(a) for _ in tab.c] for _ in 1:3)
    return Replay{T, V}(tab, points, slopes, bars, zero(a), vcat(a, theta, zero(room)))
end

"What a replay for a field works with: as the last one left it, if that was like this one."
function scratch(field::Field{T, V}, r::ReplayRequest, a::V, theta::V) where {T, V}
    work = field.scratch
    work isa Replay{T, V} && is_of(work.tab, r) && return work
    work = Replay(Tableau{T}(r), a, theta, field.kept == 0 ? zero(theta)[1:0] : field.work)
    field.scratch = work
    return work
end

"""
    replay!(steps, field, request; whole = false) -> Replayed

The gradient of a loss of the states at the output times with the cotangents `g`, with respect to the first state
(without `g` there, if not the `whole` is asked for), and to the parameters; `request` is a [`ReplayRequest`](@ref).
"""
replay!(steps::Steps, field, r::ReplayRequest; whole = false) = replay!(steps, used(steps.points), field, r, whole)

function replay!(
        steps::Steps, kept, field::Union{Field{T, V}, Parts{T, V}}, r::ReplayRequest, whole
    ) where {T, V}
    times = Vector{Float64}(r.times)
    g = reshape(borrow(V, r.g), field.n, length(times))
    a, theta = fill!(borrow(V, r.du0), zero(T)), fill!(borrow(V, r.dp), zero(T))
    work = scratch(field, r, a, theta)
    nf, apart = 0, 0.0
    direction = times[end] < times[1] ? -1.0 : 1.0
    i = length(times)  # outputs after i are done
    start = state_after!(work, field, steps, kept, length(steps.times) - 1)[1]
    for k in (length(steps.times) - 1):-1:1
        t0, t1 = steps.times[k], steps.times[k + 1]
        finish = start
        start, calls = state_after!(work, field, steps, kept, k - 1)
        while i > 1 && times[i] == t1
            a .+= view(g, :, i)
            i -= 1
        end
        last = i
        while i > 1 && direction * times[i] > direction * t0
            i -= 1
        end
        inside = (i + 1):last
        nf += calls + step!(work, field, t0, t1 - t0, start, !isempty(inside))
        apart = max(apart, distance(reached(work), finish, start, r.atol))
        pull!(work, field, a, theta, t0, t1 - t0, view(times, inside), view(g, :, inside))
    end
    whole && (a .+= view(g, :, 1))
    return Replayed(apart, nf)
end

"The state after `i` steps, later ones having been asked for before; and the calls of the field that it took."
state_after!(work, field, steps, ::Nothing, i) = state(steps.states, field.n, i + 1), 0
function state_after!(work, field, steps, kept::Checkpoints, i)
    at = kept.points[end]
    at.i == i && return pop_last!(kept), 0
    y, calls = at.y, 0
    for j in (at.i + 1):i
        t0, t1 = steps.times[j], steps.times[j + 1]
        calls += step!(work, field, t0, t1 - t0, y, false)
        y = copy(reached(work))
        j < i && place!(kept, j, y, slots(length(steps.times) - 1))
    end
    return y, calls
end

"The end of the step that was taken last."
reached(work::Replay) = work.points[work.tab.s + 1]

"Take a step from `y`: the points and slopes of its stages, and of those of dense output; returns the calls of `f`."
function step!(work::Replay{T}, field, t0, dt, y, dense) where {T}
    (; tab, points, slopes) = work
    f, calls = RHS(field), 0
    for l in 1:(dense ? length(tab.c) : tab.s + 1)
        copyto!(points[l], y)
        for j in 1:(l - 1)
            add!(points[l], T(dt) * tab.a[j, l], slopes[j])
        end
        if l <= tab.s || dense
            f(slopes[l], points[l], field.parameters, t0 + tab.c[l] * dt)
            calls += 1
        end
    end
    return calls
end

"""
Pull the cotangent `a` of the end of a step, and those of the outputs within it, (n, M), back to its start; what comes of
the parameters is added to `theta`.
"""
function pull!(work::Replay{T}, field, a, theta, t0, dt, times, g) where {T}
    (; tab, points, bars, by_start, by_both) = work
    n = length(a)
    by_point, by_theta = view(by_both, 1:n), view(by_both, (n + 1):(n + length(theta)))
    foreach(bar -> fill!(bar, zero(T)), bars)
    fill!(by_start, zero(T))
    for (time, bar) in zip(times, eachcol(g))
        part = (time - t0) / dt
        for l in eachindex(bars)
            add!(bars[l], T(dt * part * evalpoly(part, view(tab.p, :, l))), bar)
        end
        by_start .+= bar
    end
    for l in (isempty(times) ? tab.s + 1 : length(bars)):-1:1
        if nothing_in(bars[l])
            fill!(by_point, zero(T))
        else
            products!(by_both, by_point, by_theta, field, bars[l], points[l], t0 + tab.c[l] * dt)
            theta .+= by_theta
        end
        l == tab.s + 1 && (by_point .+= a)
        by_start .+= by_point
        for j in 1:(l - 1)
            add!(bars[j], T(dt) * tab.a[j, l], by_point)
        end
    end
    copyto!(a, by_start)
    return nothing
end

"Both products of `v` with the derivatives of the field, by one function where there is one."
function products!(both, by_point, by_theta, field::Field, v, u, t)
    if field.native && field.vjp_p == C_NULL
        # The value goes where the products will be.
        field.keep == C_NULL || native(field, field.keep, both, v, u, field.parameters, t)
        native(field, field.vjp, both, v, u, field.parameters, t)
    else
        VJP(field)(by_point, v, u, field.parameters, t)
        isempty(by_theta) || ParameterVJP(field)(by_theta, v, u, field.parameters, t)
    end
    return nothing
end

"Whether a cotangent is known to be zero; on a device a look would hold up the work that is queued there."
nothing_in(bar::Array) = all(iszero, bar)
nothing_in(bar) = false

"""
Largest difference of the end of a step from where it is to be, beyond `atol`, in units of the largest number in the step.
"""
function distance(u, v, start, atol = 0.0)
    largest(x) = mapreduce(abs, max, x; init = zero(eltype(x)))
    return in_units(largest(u .- v), max(largest(v), largest(start)), atol)
end

function distance(u::Array, v, start, atol = 0.0)
    far = size = zero(eltype(u))
    for (x, y, z) in zip(u, v, start)
        far, size = max(far, abs(x - y)), max(size, abs(y), abs(z))
    end
    return in_units(far, size, atol)
end

in_units(far, size, atol) = far <= atol ? 0.0 : Float64((far - atol) / size)

"Add x u to v."
function add!(v::AbstractVector{T}, x::T, u) where {T}
    iszero(x) || (v .= muladd.(x, u, v))
    return nothing
end

function add!(v::Vector{T}, x::T, u) where {T}
    iszero(x) && return nothing
    @inbounds @simd for i in eachindex(v, u)
        v[i] = muladd(x, u[i], v[i])
    end
    return nothing
end

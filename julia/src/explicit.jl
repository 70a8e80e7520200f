# Steps of explicit Runge-Kutta methods with error control: of one system (alone.jl), or of eight systems abreast
# (abreast.jl). States are in packs, or in single numbers.

"The weights of an explicit method, without the zeros: of stage l those of the stages `from[l]`."
struct Weights{T}
    from::Vector{Vector{Int}}
    by::Vector{Vector{T}}
end

function Weights{T}(a::AbstractMatrix) where {T}
    from = [findall(!iszero, column) for column in eachcol(a)]
    return Weights{T}(from, [T.(column[places]) for (column, places) in zip(eachcol(a), from)])
end

"A method, and how its error is estimated."
struct Embedded{T}
    tab::Tableau{T}
    a::Weights{T}
    e::Weights{T}
    fsal::Bool
end

"As a request says it: a [`Request`](@ref) or an [`Abreast`](@ref)."
function Embedded{T}(r) where {T}
    c = copy(Vector{Float64}(r.c))
    rows = length(c)
    a = copy(reshape(Vector{Float64}(r.a), rows, rows))
    p = copy(reshape(Vector{Float64}(r.p), :, rows))
    e = reshape(Vector{Float64}(r.e), r.stages + 1, :)
    return Embedded{T}(Tableau{T}(r.stages, T.(a), c, p), Weights{T}(a), Weights{T}(e), r.fsal != 0)
end

rows(m::Embedded) = length(m.tab.c)
"Rows of stages that a step fills; where there are more, dense output asks for them."
filled(m::Embedded) = m.tab.s + 1
"Calls of the field for a step, and for the end of one that is accepted."
calls(m::Embedded) = (m.tab.s - !m.fsal, !m.fsal)
"What dense output multiplies the stages by."
unit(m::Embedded, dt) = dt
polynomial(m::Embedded, l) = view(m.tab.p, :, l)

numbers(x::Vector{T}) where {T} = PackNumbers{T}(pointer(x))

"Numbers, or packs of them, at an address."
const Several{T} = Union{Numbers{T}, PackNumbers{T}}
zero_of(::PackNumbers{T}) where {T} = Pack{T}(0)
zero_of(::Numbers{T}) where {T} = zero(T)

# Code for sums of so many stages that none of our methods has more.
const MANY = 16

"""
    combine!(y, u, k, from, by, n, dt)

y = u + dt Σ k[j] by[j], over the stages `from`, each of `n` numbers or packs.
"""
@noinline function combine!(y::A, u::A, k::A, from, by, n, dt) where {A <: Several}
    count = length(from)
    return Base.Cartesian.@nif 17 m -> count == m m -> combine!(Val(m), y, u, k, from, by, n, dt) m ->
        combine_many!(y, u, k, from, by, n, dt)
end

"The sum of M stages at place i, as code: two sums, so that no addition waits for all before it."
function sum_of_stages(M)
    term(j) = :($(Symbol(:k_, j))[i] * $(Symbol(:by_, j)))
    more(j, total) = :(muladd($(Symbol(:k_, j))[i], $(Symbol(:by_, j)), $total))
    chain(js) = foldl((total, j) -> more(j, total), js[2:end]; init = term(js[1]))
    return M < 4 ? chain(1:M) : :($(chain(1:2:M)) + $(chain(2:2:M)))
end
stages_of(M) = [
    :(($(Symbol(:k_, j)), $(Symbol(:by_, j))) = (k + (@inbounds(from[$j]) - 1) * n, @inbounds(by[$j]))) for j in 1:M
]

# Loops over single numbers are short, or they would be over packs: they are not to be made vector code.
const PLAIN = Expr(:loopinfo, (Symbol("llvm.loop.vectorize.enable"), false), (Symbol("llvm.loop.unroll.disable"),))

@generated function combine!(::Val{M}, y::Several, u, k, from, by, n, dt) where {M}
    return quote
        $(Expr(:meta, :inline))
        $(stages_of(M)...)
        @inbounds for i in 1:n
            y[i] = muladd($(sum_of_stages(M)), dt, u[i])
            $PLAIN
        end
        return nothing
    end
end

function combine_many!(y::Several, u, k, from, by, n, dt)
    for i in 1:n
        total = zero_of(y)
        for j in eachindex(from)
            total = muladd(k[(from[j] - 1) * n + i], @inbounds(by[j]), total)
        end
        y[i] = muladd(total, dt, u[i])
    end
    return nothing
end

"""
    squares_of_error(u, y, k, from, by, n, dt, rtol, atol, to)

The sum over the places of the squares of dt Σ k[j] by[j] over the tolerances; what is squared goes to `to`, where that is
not `nothing`.
"""
@noinline function squares_of_error(u::Several, y, k, from, by, n, dt, rtol, atol, to)
    count = length(from)
    return Base.Cartesian.@nif 17 m -> count == m m -> squares_of_error(
        Val(m), u, y, k, from, by, n, dt, rtol, atol, to
    ) m -> error("an error estimate of more than $MANY stages")
end

@generated function squares_of_error(
        ::Val{M}, u::Several, y, k, from, by, n, dt, rtol, atol, to
    ) where {M}
    return quote
        $(Expr(:meta, :inline))
        $(stages_of(M)...)
        squares = zero_of(u)
        @inbounds for i in 1:n
            scale = muladd(Elementary.max(Elementary.abs(u[i]), Elementary.abs(y[i])), nth(rtol, i), nth(atol, i))
            part = $(sum_of_stages(M)) * dt / scale
            to === nothing || (to[i] = part)
            squares = muladd(part, part, squares)
            $PLAIN
        end
        return squares
    end
end
@inline nth(x::Number, i) = x
Base.@propagate_inbounds nth(x::Several, i) = x[i]

"The error of a step whose two estimates have these norms (Hairer, Nørsett & Wanner, Solving ODEs I, II.10)."
damped(first::T, second::T) where {T <: Number} =
    first == 0 ? first : first * first / sqrt(muladd(first, first, T(0.01) * second * second))

# What makes steps has a state `u`, the end `y` of the step and the stages `k`, each of `places(x)` places, and these:
# `numbers(x, v)`, the numbers or packs of its vector `v`; `steps_of(x)`, lengths of the steps as numbers of the state's
# type; and `field_at!(x, f, to, y, c)`, the field at the times t + c dt and the states at `y`, both of which are addresses.

"Take one step to y, its stages in k; of the first stage the slope is there."
function attempt!(x, f, m::Embedded{T}) where {T}
    (; u, y, k) = x
    (; s, c) = m.tab
    n, dt = places(x), steps_of(x)
    un, yn, kn = numbers(x, u), numbers(x, y), numbers(x, k)
    for l in 2:(m.fsal ? s + 1 : s)
        combine!(yn, un, kn, m.a.from[l], m.a.by[l], n, dt)
        field_at!(x, f, (kn + (l - 1) * n).address, yn.address, c[l])
    end
    m.fsal || combine!(yn, un, kn, m.a.from[s + 1], m.a.by[s + 1], n, dt)
    return nothing
end

"The slope at the end of the step."
function finish!(x, f, m::Embedded)
    field_at!(x, f, (numbers(x, x.k) + m.tab.s * places(x)).address, pointer(x.y), 1.0)
    return nothing
end

"What dense output needs beyond the step's own stages; the ends of the steps stay in y."
function complete!(x, f, m::Embedded{T}, points::Vector{T}) where {T}
    n, un, kn, to, dt = places(x), numbers(x, x.u), numbers(x, x.k), numbers(x, points), steps_of(x)
    for l in (m.tab.s + 2):rows(m)
        combine!(to, un, kn, m.a.from[l], m.a.by[l], n, dt)
        field_at!(x, f, (kn + (l - 1) * n).address, to.address, m.tab.c[l])
    end
    return nothing
end

"How step sizes are chosen: as by a `PIController` of OrdinaryDiffEq's."
struct Control
    beta1::Float64
    beta2::Float64
    gamma::Float64
    qmin::Float64
    qmax::Float64
    shortest::Float64
    longest::Float64
    first_step::Float64
    max_steps::Int
    order::Int
end

function Control(r::Request, order)
    return Control(
        r.beta1, r.beta2, r.gamma, r.qmin, r.qmax, r.min_step, r.max_step, r.first_step, r.max_steps, order
    )
end

"The least error that a step is remembered by."
const LEAST = 1.0e-4

"""
    first_step(norm, field_at, u, slope, t, direction, longest, control, point, ahead)

The first step of a system (Hairer, Nørsett & Wanner, Solving ODEs I, II.4), as OrdinaryDiffEq chooses it.

# Arguments

  - `norm`: of a vector over the tolerances at `u`, given as a function of the index.
  - `field_at`: writes the field at `point` and a time to `ahead`; both are room for a state.
  - `slope`: the field at the start `u`.
"""
function first_step(norm, field_at, u, slope, t, direction, longest, c::Control, point::AbstractVector{T}, ahead) where {T}
    c.first_step == 0 || return c.first_step
    shortest = nextfloat(max(c.shortest, eps(t)))
    small = max(shortest, 1.0e-6)
    d0, d1 = norm(i -> u[i]), norm(i -> slope[i])
    isnan(d1) && return shortest
    h0 = min(d0 < 1.0e-5 || d1 < 1.0e-5 ? small : d0 / d1 / 100, longest)
    h0 < 10 * eps() && return small
    for i in eachindex(u)
        point[i] = u[i] + T(direction * h0) * slope[i]
    end
    field_at(t + direction * h0)
    all(i -> slope[i] == ahead[i], eachindex(u)) && return max(shortest, 100 * h0)
    d2 = norm(i -> ahead[i] - slope[i]) / h0
    d = max(d1, d2)
    h1 = d <= 1.0e-15 ? max(1.0e-6, h0 * 1.0e-3) : 10.0^(-(2 + log10(d)) / c.order)
    return max(shortest, min(100 * h0, h1, longest))
end

"Whether a step of length h with this error is accepted."
is_accepted(err, h, c::Control) = err <= 1 || (c.shortest > 0 && h <= c.shortest && isfinite(err))

"""
The length of the next step after one of length h, from its error to the power of `beta1`, and the error of the accepted
step before it to that of `beta2`.
"""
function next_length(h, accepted, err, power, root, c::Control)
    accepted && return h * clamp(root * c.gamma / power, c.qmin, c.qmax)
    return isfinite(err) ? h * max(c.qmin, c.gamma / power) : h * c.qmin
end

"A step from t of length h within its limits, or to the end: its length with its sign, and whether it is the last."
function within_limits(h, t, end_time, direction, limit, c::Control)
    h = max(min(h, limit), c.shortest)
    rest = abs(end_time - t)
    last = isfinite(rest) && !(h + 100 * eps() * max(abs(t), abs(end_time)) < rest)
    return last ? end_time - t : direction * h, last
end

# Adding it puts an integer into the low bits of a number.
const SHIFT = 0x1.8p52

"log2(x) of a normal positive number: for a mantissa around 1 by the series of the area tangent. Of 0 it is -1023."
@inline function plain_log2(x::Float64)
    root = 0x3fe6a09e667f3bcd % Int64  # of the square root of 1/2
    bits = reinterpret(Int64, x) - root
    e = reinterpret(Float64, (bits >> 52) + reinterpret(Int64, SHIFT)) - SHIFT
    m = reinterpret(Float64, (bits & 0x000fffffffffffff % Int64) + root)
    s = (m - 1) / (m + 1)
    return muladd(s, evalpoly(s * s, (2 / log(2), 2 / 3log(2), 2 / 5log(2), 2 / 7log(2))), e)
end

"2^x for |x| < 300, else that of the end."
@inline function plain_exp2(x::Float64)
    x = ifelse(x > 300.0, 300.0, ifelse(x < -300.0, -300.0, x))
    shifted = x + SHIFT
    r = (x - (shifted - SHIFT)) * log(2)
    k = reinterpret(Int64, shifted) - reinterpret(Int64, SHIFT)
    return evalpoly(r, (1.0, 1.0, 1 / 2, 1 / 6, 1 / 24, 1 / 120, 1 / 720)) * reinterpret(Float64, (k + 1023) << 52)
end

"""
The powers of errors that the control of steps asks for, to a millionth, without branches; of an error that is not finite
they mean nothing.
"""
function powers!(powers, roots, errors, beta1, beta2)
    @inbounds @simd ivdep for w in 1:WIDTH
        powers[w], roots[w] = powers_of(errors[w], beta1, beta2)
    end
    return nothing
end

@inline function powers_of(err, beta1, beta2, least = LEAST)
    l, least = plain_log2(err), plain_log2(least)
    return plain_exp2(beta1 * l), plain_exp2(beta2 * ifelse(l > least, l, least))
end

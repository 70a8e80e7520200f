# One system by an explicit Runge-Kutta method with error control: the loop of OrdinaryDiffEq's solver for fields that are
# compiled, where nothing is asked for but states at output times. It takes the steps that OrdinaryDiffEq takes.

"""
The accepted steps of a solve: the times that they end at, from its start on; the states there, as a solve has them,
and their stages, of as many of the first steps as there is `room` for.

  - `points`: where only some of the states are kept, these; and nothing else then but the times.
  - `values`: what the field's function `keep` wrote, of `kept` numbers for each of the stages of the first `valued`
    steps; the last stage of a step is the first of the next.
"""
mutable struct Trail{T}
    const method::Embedded{T}
    const times::Vector{Float64}
    const states::Vector{T}
    const points::Union{Nothing, Checkpoints{Vector{T}}}
    const stages::Vector{T}
    const room::Int
    values::Vector{T}
    valued::Int
end

"""
Bytes of the stages of a solve that are kept, and of what the field computed for them. Of later steps they are computed
again.
"""
const KEPT = 1 << 26
"Bytes up to which room for these is used again, once nobody needs what is there: new memory takes long to be had."
const SPARED = 1 << 24

function Trail(method::Embedded{T}, values, few) where {T}
    points, room = few ? (Checkpoints{Vector{T}}(), 0) : (nothing, KEPT ÷ sizeof(T))
    return Trail{T}(method, Float64[], T[], points, T[], room, values, 0)
end

"Room for the steps of a solve like another."
function like(trail::Trail{T}, values) where {T}
    room(x) = sizehint!(empty(x), length(x))
    (; method, times, states, points, stages) = trail
    return Trail{T}(method, room(times), room(states), like(points), room(stages), trail.room, values, 0)
end

"The room that the last solve of a field left."
function take_values!(field::Field{T}) where {T}
    values, field.values = field.values, T[]
    return values
end

function recycle!(trail::Trail{T}, field) where {T}
    (; values) = trail
    if length(field.values) < length(values) <= SPARED ÷ sizeof(T)
        field.values = values
    end
    trail.values, trail.valued = T[], 0
    return nothing
end

"""
A solve by such a loop, to be made again and again from other first states, and room for it.

  - `f`: as [`called`](@ref) makes it, or an [`Inlined`](@ref) one.
  - `u`, `y`, `k`: the state, the end of the step and its stages. `A` is `PackNumbers` where they are in whole packs, with
    zeros behind the state; of few numbers they are single ones: a pack that is read soon after its numbers were written
    one by one waits until they are in the cache.
  - `rtol`, `atol`: of each number; behind the state they are 1.
  - `offsets`: as [`Request`](@ref) has them.
"""
mutable struct Alone{T, F, A}
    const field::Field{T, Vector{T}}
    const f::F
    const method::Embedded{T}
    const control::Control
    const times::Vector{Float64}
    const offsets::Vector{Int}
    const rtol::Vector{T}
    const atol::Vector{T}
    u::Vector{T}
    y::Vector{T}
    const k::Vector{T}
    const point::Vector{T}
    const parts::Vector{T}  # of the error, over the tolerances
    const keep::Bool
    const few::Bool  # of the states of its steps are to be kept
    trail::Union{Nothing, Trail{T}}
    t::Float64
    dt::Float64
    values::Vector{T}  # of the trail
    at::Int  # how many stages are behind the step at hand; negative where no values are kept of it
end

"What a state of n numbers is a vector of, and the length of that."
form(::Type{T}, n) where {T} = n < WIDTH ? (Numbers{T}, n) : (PackNumbers{T}, cld(n, WIDTH) * WIDTH)
unit_of(::Type{<:Numbers}) = 1
unit_of(::Type{<:PackNumbers}) = WIDTH

"What the replay of such steps works with, a step of which is as that of an [`Alone`](@ref)."
mutable struct Retaken{T, F, G, A}
    const field::Field{T, Vector{T}}
    const f::F
    const again::F  # what `pull` is to find is written by this, where there is such a function
    const pull::G
    const method::Embedded{T}
    const after::Weights{T}  # of each stage, the weights that the later stages and the end of the step have it with
    const after_dense::Weights{T}  # with those of dense output among the later stages
    const u::Vector{T}
    const y::Vector{T}
    const k::Vector{T}
    const point::Vector{T}
    const a::Vector{T}  # the cotangent so far
    const bar::Vector{T}  # that of a stage
    const points::Vector{T}  # those of the points of all stages
    const inside::Vector{T}  # of each stage what outputs within the step add to its cotangent, and last to that of u
    const both::Vector{T}
    t::Float64
    dt::Float64
end

function Retaken(trail::Trail{T}, field::Field{T, Vector{T}}) where {T}
    (A, size), method = form(T, field.n), trail.method
    (; a, s) = method.tab
    room(m) = zeros(T, size * m)
    f, pull = called(field, field.f), called(field, field.vjp)
    again = field.keep == C_NULL ? f : called(field, field.keep)
    return Retaken{T, typeof(f), typeof(pull), A}(
        field, f, again, pull, method, Weights{T}(permutedims(a[1:(s + 1), 1:(s + 1)])), Weights{T}(permutedims(a)), room(1), room(1),
        room(rows(method)), room(1), room(1), room(1), room(rows(method)), room(rows(method) + 1),
        zeros(T, field.n + length(field.parameters) + (field.kept == 0 ? 0 : length(field.work))), 0.0, 0.0
    )
end

const OfOne{T, A} = Union{Alone{T, F, A} where {F}, Retaken{T, F, G, A} where {F, G}}
places(x::OfOne{T, A}) where {T, A} = length(x.u) ÷ unit_of(A)
numbers(::OfOne{T, A}, v::Vector{T}) where {T, A} = A(pointer(v))
steps_of(x::OfOne{T}) where {T} = T(x.dt)

"Whether a request is one for this loop."
function is_alone(field::Field{T, V}, r::Request) where {T, V}
    V === Vector{T} && field.native && field.event == C_NULL || return false
    r.keep == 0 || (field.vjp != C_NULL && field.vjp_p == C_NULL) || return false
    return r.c.length > 0 && r.dense == 0 && r.fixed == 0 && r.beta1 != 0 && iszero(r.stops.length + r.jumps.length + r.mass.length)
end
is_alone(field, r::Request) = false

function Alone(field::Field{T, Vector{T}}, r::Request) where {T}
    source = r.full == 0 ? field : inlined(field)
    f = r.keep == 1 && field.keep != C_NULL ? field.keep : field.f
    return Alone(field, source isa Source ? source.f : called(field, f), r)
end

function Alone(field::Field{T, Vector{T}}, f::F, r::Request) where {T, F}
    n, method = field.n, Embedded{T}(r)
    A, size = form(T, n)
    tolerances(lent) = (x = ones(T, size); x[1:n] .= tolerance(lent); x)
    offsets = r.offsets.length == 0 ? [0, n] : copy(Vector{Int64}(r.offsets))
    return Alone{T, F, A}(
        field, f, method, Control(r, r.order), copy(Vector{Float64}(r.times)), offsets, tolerances(r.rtol),
        tolerances(r.atol), zeros(T, size), zeros(T, size), zeros(T, size * rows(method)), zeros(T, size),
        zeros(T, size), r.keep != 0, r.keep == 2, nothing, 0.0, 0.0, T[], -1
    )
end

@inline field_at!(x::Retaken, f, to, y, c) = f(to, y, y, muladd(c, x.dt, x.t))
@inline function field_at!(x::Alone{T}, f, to, y, c) where {T}
    time = muladd(c, x.dt, x.t)
    x.at < 0 && return f(to, y, y, time)
    stage = Int(to - pointer(x.k)) ÷ (length(x.u) * sizeof(T))
    return f(to, y, y, time, pointer(x.values) + (x.at + stage) * x.field.kept * sizeof(T))
end

"Have room for what is kept of the next step, if there is any."
function make_room!(x::Alone{T}) where {T}
    (; field, method) = x
    needed = (x.at + rows(method) + 1) * field.kept + length(field.work)
    if needed > KEPT ÷ sizeof(T)
        x.at = -1
    elseif needed > length(x.values)
        resize!(x.values, min(max(needed, 2length(x.values)), KEPT ÷ sizeof(T)))
    end
    return nothing
end

"The square of the error of the step over the tolerances: the largest mean square of the tensors of the state."
function square_of_error(x::Alone)
    e = x.method.e
    first = mean_square_of_error(x, e.from[1], e.by[1])
    return length(e.from) == 1 ? first : damped(sqrt(first), sqrt(mean_square_of_error(x, e.from[2], e.by[2])))^2
end

function mean_square_of_error(x::Alone, from, by)
    (; u, y, k, rtol, atol, parts, offsets, field) = x
    of(v) = numbers(x, v)
    one = length(offsets) == 2
    squares = squares_of_error(
        of(u), of(y), of(k), from, by, places(x), steps_of(x), of(rtol), of(atol), one ? nothing : of(parts)
    )
    return one ? total_of(squares) / field.n : largest_norm(i -> parts[i], offsets)^2
end

total_of(x::Number) = x
@inline function total_of(x::Pack)
    return ((x[1] + x[5]) + (x[3] + x[7])) + ((x[2] + x[6]) + (x[4] + x[8]))
end

"The largest root mean square of numbers, given as a function of the index, among the tensors at `offsets`."
function largest_norm(f, offsets)
    largest = zero(f(1))
    for j in 2:length(offsets)
        places = (offsets[j - 1] + 1):offsets[j]
        rms = sqrt(sum(i -> abs2(f(i)), places; init = zero(largest)) / max(length(places), 1))
        isnan(rms) && return rms
        largest = max(largest, rms)
    end
    return largest
end

function first_step(x::Alone{T}, direction, longest) where {T}
    (; field, u, y, k, point, control) = x
    n = field.n
    scale(i) = Float64(x.atol[i]) + abs(Float64(u[i])) * Float64(x.rtol[i])
    norm(f) = largest_norm(i -> Float64(f(i)) / scale(i), x.offsets)
    field_at(t) = native(field, field.f, y, point, point, field.parameters, t)
    state = view(u, 1:n)
    return first_step(norm, field_at, state, view(k, 1:n), x.t, direction, longest, control, view(point, 1:n), y)
end

"""
    run!(alone, u0, out) -> Outcome

Solve from the state at `u0`, and write the states at the output times to `out`. Both are addresses.
"""
function run!(x::Alone{T}, u0::Ptr{T}, out::Ptr{T}) where {T}
    (; field, times) = x
    GC.@preserve x begin
        fill!(x.u, zero(T))  # what a solve that failed left behind the state is of no use
        fill!(x.y, zero(T))
        fill!(x.k, zero(T))
        unsafe_copyto!(pointer(x.u), u0, field.n)
        unsafe_copyto!(out, u0, field.n)
        if x.keep
            values = x.few ? T[] : take_values!(field)
            x.trail = x.trail === nothing ? Trail(x.method, values, x.few) : like(x.trail, values)
            x.values, x.at = values, x.few || field.keep == C_NULL ? -1 : 0
            x.at < 0 || make_room!(x)
        end
        outcome = march!(x, x.f, Numbers(out))
        x.values, x.at = T[], -1  # the trail has them
        return outcome
    end
end

function march!(x::Alone{T}, f, out::Numbers{T}) where {T}
    (; field, method, control, times, k) = x
    n, t_end = field.n, times[end]
    x.t, x.dt = times[1], 0.0
    field_at!(x, f, pointer(k), pointer(x.u), 0.0)
    direction = t_end < x.t ? -1.0 : 1.0
    longest = min(control.longest, abs(t_end - x.t))
    h = first_step(x, direction, longest)
    nf, accepted, rejected, output, root = 2 - (control.first_step != 0), 0, 0, 2, LEAST^control.beta2
    for_step, for_end = calls(method)
    note!(x.trail, x, 0)
    while true
        x.dt, is_last = within_limits(h, x.t, t_end, direction, longest, control)
        attempt!(x, f, method)
        square, h = Float64(square_of_error(x)), abs(x.dt)
        ok = is_accepted(square, h, control)
        power, next_root = powers_of(square, control.beta1 / 2, control.beta2 / 2, LEAST^2)
        h = next_length(h, ok, square, power, root, control)
        nf += for_step
        if ok
            accepted, root = accepted + 1, next_root
            for_end && (nf += 1; finish!(x, f, method))
            t = is_last ? t_end : x.t + x.dt
            if direction * times[output] <= direction * t
                output, extra = write_outputs!(x, f, out, output, t, direction)
                nf += extra
            end
            note!(x.trail, x, t, method.tab.s)
            x.at < 0 || make_room!(x)
            is_last && (x.t = t)
            is_last && break
            x.u, x.y, x.t = x.y, x.u, t
            go_on!(x)
        else
            rejected += 1
        end
        cause = if accepted + rejected >= control.max_steps
            ReturnCode.MaxIters
        elseif !ok && h <= eps(abs(x.t))
            ReturnCode.Unstable
        else
            continue
        end
        finite = cause == ReturnCode.MaxIters || goes_on(x, f, direction)
        return outcome(x, cause, direction * h, accepted, rejected, nf, finite)
    end
    finite = all(i -> isfinite(out[i]), 1:(n * length(times)))
    return outcome(x, ReturnCode.Success, direction * h, accepted, rejected, nf, finite)
end

"The slope at the end of a step is that at the start of the next."
function go_on!(x::Alone)
    n, s = places(x), x.method.tab.s
    k = numbers(x, x.k)
    for i in 1:n
        k[i] = k[s * n + i]
    end
    return nothing
end

function outcome(x::Alone, cause, dt, accepted, rejected, nf, finite)
    return Outcome(code_name(cause), x.t, dt, NaN, accepted, rejected, 0, 0, 0, nf, 1, finite)
end

"Whether the field is finite where the solver gave up, and just after it."
function goes_on(x::Alone{T}, f, direction) where {T}
    (; u, k, point, field) = x
    ahead = direction * sqrt(eps(T)) * max(1, abs(x.t))
    slope = view(k, 1:(field.n))
    x.dt = ahead
    field_at!(x, f, pointer(k), pointer(u), 0.0)
    point .= u
    view(point, 1:(field.n)) .+= T(ahead) .* slope
    field_at!(x, f, pointer(k), pointer(point), 1.0)
    return all(isfinite, slope)
end

"Write the states at the output times up to t, the end of the step: the next output, and calls of the field for them."
function write_outputs!(x::Alone{T}, f, out, output, t, direction) where {T}
    (; times, method, u, y, field) = x
    n, calls = field.n, 0
    done = rows(method) == filled(method)
    while output <= length(times) && direction * times[output] <= direction * t
        to = out + (output - 1) * n
        if times[output] == t
            unsafe_copyto!(to.address, pointer(y), n)
        else
            if !done
                complete!(x, f, method, x.point)
                done, calls = true, rows(method) - filled(method)
            end
            dense!(to, x, (times[output] - x.t) / x.dt)
        end
        output += 1
    end
    return output, calls
end

"The state at t + part dt."
function dense!(to::Numbers{T}, x::Alone{T}, part) where {T}
    (; u, k, point, method, field) = x
    size = length(u)
    copyto!(point, u)
    for l in 1:rows(method)
        weight = T(x.dt * part * evalpoly(part, polynomial(method, l)))
        iszero(weight) || add!(x, point, weight, k, l)
    end
    unsafe_copyto!(to.address, pointer(point), field.n)
    return nothing
end

"Add c times the part l of v, each as long as u, to u."
function add!(x::OfOne, u::Vector{T}, c::T, v::Vector{T}, l::Int) where {T}
    n = places(x)
    un, vn = numbers(x, u), numbers(x, v) + (l - 1) * n
    @inbounds for i in 1:n
        un[i] = muladd(vn[i], c, un[i])
    end
    return nothing
end

note!(::Nothing, x::Alone, args...) = nothing
function note!(trail::Trail, x::Alone, ::Int)
    note_state!(trail, x.u)
    push!(trail.times, x.t)
    return nothing
end
note_state!(trail::Trail, u) = note_state!(trail, trail.points, u)
note_state!(trail, ::Nothing, u) = append!(trail.states, u)
note_state!(trail, points::Checkpoints, u) = place!(points, length(trail.times), u, slots(length(trail.times)))
"That step's end at t, and its s stages."
function note!(trail::Trail, x::Alone, t, s::Int)
    note_state!(trail, x.y)
    push!(trail.times, t)
    if x.at >= 0
        x.at += s
        trail.valued += 1
    end
    size, stages = s * length(x.u), trail.stages
    # With a gap the stages of later steps would not be in their places.
    whole = length(stages) == size * (length(trail.times) - 2)
    if whole && length(stages) + size <= trail.room
        at = length(stages)
        resize!(stages, at + size)
        unsafe_copyto!(pointer(stages, at + 1), pointer(x.k), size)
    end
    return nothing
end

"""
As for steps of SciML's solvers. Where the stages are kept, one of each step is computed again, to see whether the field
is still what it was.
"""
function replay!(trail::Trail{T}, field::Field{T, V}, r::ReplayRequest; whole = false) where {T, V}
    times = Vector{Float64}(r.times)
    g = reshape(Vector{T}(r.g), field.n, length(times))
    by_start, theta = Vector{T}(r.du0), fill!(Vector{T}(r.dp), zero(T))
    work = field.scratch
    if !(work isa Retaken && work.method === trail.method)
        work = field.scratch = Retaken(trail, field)
    end
    fill!(work.a, zero(T))
    replayed = GC.@preserve work trail theta back!(work, trail, times, g, theta)
    copyto!(by_start, view(work.a, 1:(field.n)))
    whole && (by_start .+= view(g, :, 1))
    return replayed
end

function back!(x::Retaken{T}, trail::Trail{T}, times, g, theta) where {T}
    (; a, u, y, inside, method) = x
    s, size = method.tab.s, length(u)
    nf, apart, i = 0, zero(T), length(times)  # outputs after i are done
    direction = times[end] < times[1] ? -1.0 : 1.0
    kept = used(trail.points)
    state_after!(x, trail, kept, length(trail.times) - 1)
    for j in (length(trail.times) - 1):-1:1
        copyto!(y, u)
        nf += state_after!(x, trail, kept, j - 1)
        t1 = step_of!(x, trail, j)
        while i > 1 && times[i] == t1
            add_column!(a, g, i)
            i -= 1
        end
        last = i
        while i > 1 && direction * times[i] > direction * x.t
            i -= 1
        end
        if j * s * size <= length(trail.stages)
            unsafe_copyto!(pointer(x.k), pointer(trail.stages, (j - 1) * s * size + 1), s * size)
            apart = max(apart, look_again!(x, mod1(j, s)))
            nf += 1
        else
            apart = max(apart, take_again!(x))
            nf += s
        end
        dense = last > i
        if dense
            finish!(x, x.f, method)
            complete!(x, x.f, method, x.point)
            nf += rows(method) - s
            for l in (i + 1):last
                add_inside!(x, (times[l] - x.t) / x.dt, g, l)
            end
        end
        values = j <= trail.valued ? pointer(trail.values, (j - 1) * s * x.field.kept + 1) : Ptr{T}(0)
        pull!(x, theta, dense, values)
        dense && fill!(inside, zero(T))
    end
    return Replayed(apart, nf)
end

"Have step j be the one at hand: where it ends."
function step_of!(x::Retaken, trail, j)
    x.t, t1 = trail.times[j], trail.times[j + 1]
    x.dt = t1 - x.t
    return t1
end

"Have the state after `i` steps in u, later ones having been asked for before: the calls of the field that it took."
function state_after!(x::Retaken, trail::Trail, ::Nothing, i)
    size = length(x.u)
    unsafe_copyto!(pointer(x.u), pointer(trail.states, i * size + 1), size)
    return 0
end

function state_after!(x::Retaken, trail::Trail, kept::Checkpoints, i)
    (; u, point, method) = x
    at = kept.points[end]
    copyto!(u, at.y)
    at.i == i && return (pop_last!(kept); 0)
    for j in (at.i + 1):i
        step_of!(x, trail, j)
        retake!(x)
        copyto!(u, point)
        j < i && place!(kept, j, u, slots(length(trail.times) - 1))
    end
    return (i - at.i) * method.tab.s
end

function add_column!(a, g, i)
    for j in axes(g, 1)
        @inbounds a[j] += g[j, i]
    end
    return nothing
end

"The point of stage l."
function point!(x::Retaken, l)
    (; method, u, y, point) = x
    (; from, by) = method.a
    isempty(from[l]) && return u
    l == method.tab.s + 1 && return y
    combine!(numbers(x, point), numbers(x, u), numbers(x, x.k), from[l], by[l], places(x), steps_of(x))
    return point
end

"Compute stage l once more: how far the step is from it, in units of the largest number in it."
function look_again!(x::Retaken{T}, l) where {T}
    (; k, u, y, bar, field, method) = x
    field_at!(x, x.f, pointer(bar), pointer(point!(x, l)), method.tab.c[l])
    far = largest = zero(T)
    skipped = (l - 1) * length(u)
    for i in 1:(field.n)
        @inbounds far = max(far, abs(bar[i] - k[skipped + i]))
        @inbounds largest = max(largest, abs(u[i]), abs(y[i]))
    end
    return iszero(far) ? far : abs(T(x.dt)) * far / largest
end

"Take the step from u again: how far it ends from where it did, y."
function take_again!(x::Retaken{T}) where {T}
    retake!(x)
    return T(distance(x.point, x.y, x.u))
end

"Its stages, and its end in `point`."
function retake!(x::Retaken)
    (; k, u, point, method) = x
    (; s, c) = method.tab
    for l in 1:s
        field_at!(x, x.f, pointer(k, (l - 1) * length(u) + 1), pointer(point!(x, l)), c[l])
    end
    of(v) = numbers(x, v)
    combine!(of(point), of(u), of(k), method.a.from[s + 1], method.a.by[s + 1], places(x), steps_of(x))
    return nothing
end

"Add the cotangent of output l, at t + part dt."
function add_inside!(x::Retaken{T}, part, g, l) where {T}
    (; inside, method, u) = x
    size = length(u)
    for row in 1:rows(method)
        weight = T(x.dt * part * evalpoly(part, polynomial(method, row)))
        iszero(weight) && continue
        for i in axes(g, 1)
            @inbounds inside[(row - 1) * size + i] = muladd(weight, g[i, l], inside[(row - 1) * size + i])
        end
    end
    for i in axes(g, 1)
        @inbounds inside[rows(method) * size + i] += g[i, l]
    end
    return nothing
end

"""
Pull the cotangent `a` of the end of a step back to its start; what comes of the parameters is added to `theta`. `values`
is the address of what was kept of the step, or null.
"""
function pull!(x::Retaken{T}, theta, dense, values) where {T}
    (; method, field, a, bar, points, inside, both) = x
    n, m, size, s = places(x), field.n, length(x.u), method.tab.s
    of(v) = numbers(x, v)
    weights, top = dense ? (x.after_dense, rows(method)) : (x.after, s + 1)
    for l in top:-1:1
        to = pointer(points, (l - 1) * size + 1)
        if l == s + 1 && !dense
            unsafe_copyto!(to, pointer(a), size)
            continue
        end
        from, by, base = weights.from[l], weights.by[l], of(inside) + (l - 1) * n
        if isempty(from)
            unsafe_copyto!(pointer(bar), base.address, size)
        else
            combine!(of(bar), base, of(points), from, by, n, steps_of(x))
        end
        if all(iszero, bar)
            fill!(view(points, ((l - 1) * size + 1):(l * size)), zero(T))
        else
            point, time, work = pointer(point!(x, l)), muladd(method.tab.c[l], x.dt, x.t), pointer(field.work)
            if values != C_NULL && l <= s + 1
                work = values + (l - 1) * field.kept * sizeof(T)
            elseif field.keep != C_NULL
                x.again(Ptr{T}(0), point, point, time)
            end
            x.pull(pointer(both), pointer(bar), point, time, work)
            unsafe_copyto!(to, pointer(both), m)
            add_rest!(theta, both, m)
        end
        if l == s + 1
            for i in 1:m
                points[(l - 1) * size + i] += a[i]
            end
        end
    end
    # Each point begins with u.
    unsafe_copyto!(pointer(a), (of(inside) + rows(method) * n).address, size)
    for l in 1:top
        add!(x, a, one(T), points, l)
    end
    return nothing
end

function add_rest!(theta, both, m)
    @inbounds @simd ivdep for i in eachindex(theta)
        theta[i] += both[m + i]
    end
    return nothing
end

# The steps of a sweep taken again, eight systems abreast in the lanes that they were in: backward, for gradients, or those
# in which some times lie, for dense output.

"What takes the steps of one thread's part of a sweep again; `busy` is 1 for the lanes that have one, of `system`."
struct Rerun{T, M}
    swept::Swept{T, M}
    track::Track{T}
    crew::Crew{T}
    method::M
    points::Vector{T}  # of the stages
    busy::Vector{T}
    system::Vector{Int}
end

function Rerun(swept::Swept{T, M}, track) where {T, M}
    n, all = swept.field.n, rows(swept.method)
    return Rerun{T, M}(
        swept, track, Crew(swept.field, all), copy(swept.method), zeros(T, WIDTH * n * all), zeros(T, WIDTH),
        zeros(Int, WIDTH)
    )
end

"Have the lanes be at the starts of the steps in block j, and `begin_with(w, i)` where lane w has a system i new to it."
function load!(begin_with, r::Rerun, j)
    (; crew, track) = r
    chunk, before = place_of(track, j)
    size = WIDTH * crew.n
    copyto!(crew.u, 1, chunk.states, before * size + 1, size)
    copyto!(crew.t, 1, chunk.times, before * WIDTH + 1, WIDTH)
    for w in 1:WIDTH
        i = Int(chunk.systems[before * WIDTH + w])
        r.busy[w] = i != 0
        crew.dt[w] = i == 0 ? 0.0 : chunk.steps[before * WIDTH + w]
        (i == 0 || i == r.system[w]) && continue
        begin_with(w, i)
        r.system[w] = i
        hold!(crew, w, r.swept.places, view(r.swept.values, :, i))
    end
    return nothing
end

"Take the steps again: points and slopes of the stages, and where `dense` of those of dense output. Calls of the field."
function step_again!(r::Rerun{T, Embedded{T}}, dense) where {T}
    (; crew, points, method) = r
    (; n, u, k) = crew
    un, kn, at, dt = numbers(u), numbers(k), numbers(points), steps_of(crew)
    stages = dense ? rows(method) : method.tab.s
    for l in 1:stages
        to = at + (l - 1) * n
        if isempty(method.a.from[l])
            for i in 1:n
                to[i] = un[i]
            end
        else
            combine!(to, un, kn, method.a.from[l], method.a.by[l], n, dt)
        end
        set_time!(crew, method.tab.c[l])
        packed(r.swept.f, crew, (kn + (l - 1) * n).address, to.address, to.address)
    end
    return stages * count(==(1), r.busy)
end

function step_again!(r::Rerun{T, Rosenbrock{T}}, dense) where {T}
    (; crew, points, method) = r
    n, un, kn, at = crew.n, numbers(crew.u), numbers(crew.k), numbers(points)
    attempt!(crew, r.swept.f, method)
    for l in 1:(method.s)
        sum_of!(at + (l - 1) * n, un, kn, method.a.from[l], method.a.by[l], n)
    end
    return method.s * count(==(1), r.busy)
end

"""
    pull!(swept, request) -> calls of the field

The gradient of a loss of the states at the output times: each accepted step is taken again, the last one first, in the
same lanes as it was. `request` is a [`PullRequest`](@ref).
"""
function pull!(swept::Swept{T}, r::PullRequest) where {T}
    n, count = swept.field.n, size(swept.values, 2)
    du0 = fill!(reshape(Vector{T}(r.du0), n, count), zero(T))
    g = reshape(Vector{T}(r.g), n, count, :)
    dv = fill!(reshape(Vector{T}(r.dv), length(swept.places), count), zero(T))
    dp = fill!(Vector{T}(r.dp), zero(T))
    work(i) = (back = Back(Rerun(swept, swept.tracks[i]), du0, dv, g); walk!(back, r); back)
    parts = if length(swept.parts) == 1
        [work(1)]
    else
        fetch.([Threads.@spawn work(i) for i in eachindex(swept.parts)])
    end
    for back in parts, i in eachindex(dp)
        dp[i] += sum(w -> back.theta[at_lane(i, w)], 1:WIDTH)
    end
    r.dt.length == 0 || by_times!(swept, r, du0, g)
    return sum(back -> back.calls, parts; init = 0)
end

"""
The gradient by the times: a state moves with its time as the field says, and against that of the start. Of a stiff system
the field makes much of an error of the state; there it is the slope of the dense output.
"""
function by_times!(swept::Swept{T, M}, r::PullRequest, du0, g) where {T, M}
    (; field, times) = swept
    n, count = size(du0)
    states = reshape(Vector{T}(r.states), n, count, size(times, 1))
    by = reshape(Vector{Float64}(r.dt), size(times, 1), count)
    slope, u = zeros(T, n), zeros(T, n)
    slopes = zeros(T, M <: Rosenbrock ? size(states) : (0, 0, 0))
    M <: Rosenbrock && interpolate!(swept, times, slopes; of = slope!)
    along(bar) = all(iszero, bar) ? 0.0 : sum(j -> Float64(bar[j]) * slope[j], 1:n)
    for i in 1:count
        for (place, value) in zip(swept.places, view(swept.values, :, i))
            set_held!(field, place, value)
        end
        for (k, t) in enumerate(times_of(swept, i))
            if k > 1 && M <: Rosenbrock
                copyto!(slope, view(slopes, :, i, k))
            else
                copyto!(u, view(states, :, i, k))
                native(field, field.f, slope, u, u, field.parameters, t)
            end
            by[k, i] = k == 1 ? -along(view(du0, :, i)) : along(view(g, :, i, k))
        end
    end
    return nothing
end

"What one thread's part of a pull works with; `a` and `theta` are the cotangents so far."
mutable struct Back{T, M}
    const again::Rerun{T, M}
    const bars::Vector{T}
    const by_both::Vector{T}
    const by_start::Vector{T}
    const bent::Vector{T}
    const a::Vector{T}
    const theta::Vector{T}
    const output::Vector{Int}
    const after::Vector{Float64}  # the end of the step
    const trained::Vector{Int}  # of the places those that are parameters
    const du0::Matrix{T}
    const dv::Matrix{T}
    const g::Array{T, 3}
    calls::Int
end

function Back(again::Rerun{T, M}, du0, dv, g) where {T, M}
    swept = again.swept
    n, m, all = swept.field.n, length(swept.field.parameters), rows(swept.method)
    room(k) = zeros(T, WIDTH * k)
    trained = findall(<=(m), swept.places)
    bent = room(M <: Rosenbrock ? n * n + n : 0)
    return Back{T, M}(
        again, room(n * all), room(n + m), room(n), bent, room(n), room(m), zeros(Int, WIDTH), zeros(WIDTH), trained, du0,
        dv, g, 0
    )
end

function walk!(b::Back, r::PullRequest)
    (; again) = b
    GC.@preserve b again for j in again.track.blocks:-1:1
        load!((w, i) -> take_up!(b, w, i), again, j)
        inside = ends!(b)
        b.calls += step_again!(again, inside)
        pull_step!(b, r, inside)
    end
    foreach(w -> put_down!(b, w), 1:WIDTH)
    return nothing
end

"Lane w is from now on at the end of system i, whose last step is that of the lane."
function take_up!(b::Back, w, i)
    put_down!(b, w)
    (; crew, swept) = b.again
    times = times_of(swept, i)
    b.output[w] = length(times)
    # A system that failed has no states beyond its last step.
    reached, direction = crew.t[w] + crew.dt[w], sign(crew.dt[w])
    gap = 200 * eps(max(abs(reached), abs(times[end])))
    b.after[w] = abs(times[end] - reached) <= gap ? times[end] : reached
    while b.output[w] > 1 && direction * times[b.output[w]] > direction * b.after[w]
        b.output[w] -= 1
    end
    return nothing
end

"Lane w has come to the start of its system: its cotangents are the system's."
function put_down!(b::Back{T}, w) where {T}
    i = b.again.system[w]
    i == 0 && return nothing
    for j in 1:(b.again.crew.n)
        b.du0[j, i] = b.a[at_lane(j, w)]
        b.a[at_lane(j, w)] = zero(T)
    end
    for j in b.trained
        at = at_lane(b.again.swept.places[j], w)
        b.dv[j, i] = b.theta[at]
        b.theta[at] = zero(T)
    end
    b.again.system[w] = 0
    return nothing
end

"Add the cotangents of outputs at the ends of the steps, and put those within into `bars`; whether there are such."
function ends!(b::Back{T}) where {T}
    (; bars, by_start, a, g) = b
    (; crew, swept, method) = b.again
    n, inside = crew.n, false
    fill!(bars, zero(T))
    fill!(by_start, zero(T))
    for w in 1:WIDTH
        b.again.busy[w] == 1 || continue
        i = b.again.system[w]
        times, direction = times_of(swept, i), sign(crew.dt[w])
        while b.output[w] > 1 && times[b.output[w]] == b.after[w]
            for j in 1:n
                a[at_lane(j, w)] += g[j, i, b.output[w]]
            end
            b.output[w] -= 1
        end
        while b.output[w] > 1 && direction * times[b.output[w]] > direction * crew.t[w]
            inside = true
            part = (times[b.output[w]] - crew.t[w]) / crew.dt[w]
            for l in 1:rows(method)
                weight = T(unit(method, crew.dt[w]) * part * evalpoly(part, polynomial(method, l)))
                for j in 1:n
                    bars[at_lane((l - 1) * n + j, w)] += weight * g[j, i, b.output[w]]
                end
            end
            for j in 1:n
                by_start[at_lane(j, w)] += g[j, i, b.output[w]]
            end
            b.output[w] -= 1
        end
        b.after[w] = crew.t[w]
    end
    return inside
end

"Call a function of products, whose last numbers are by the parameters."
function multiply!(b::Back{T}, f, v::PackNumbers{T}, point::PackNumbers{T}) where {T}
    crew, both, theta = b.again.crew, numbers(b.by_both), numbers(b.theta)
    busy = numbers(b.again.busy)[1] == one(T)
    packed(f, crew, both.address, v.address, point.address)
    for i in 1:(length(b.theta) ÷ WIDTH)
        theta[i] = theta[i] + ifelse(busy, both[crew.n + i], zero(T))
    end
    return both
end

"The cotangents at the starts of the steps are those that the next ones go back from."
function go_back!(b::Back{T}) where {T}
    a, start = numbers(b.a), numbers(b.by_start)
    busy = numbers(b.again.busy)[1] == one(T)
    for i in 1:(b.again.crew.n)
        a[i] = ifelse(busy, start[i], a[i])
    end
    return nothing
end

"Pull the cotangents of the ends of the steps, and of what is within, back to their starts."
function pull_step!(b::Back{T, Embedded{T}}, r::PullRequest, dense) where {T}
    (; crew, method) = b.again
    n, (; s, c) = crew.n, method.tab
    bars, points, both, dt = numbers(b.bars), numbers(b.again.points), numbers(b.by_both), steps_of(crew)
    a, start = numbers(b.a), numbers(b.by_start)
    # y1 = y + dt Σ b k, and of dense output there may be more behind y1.
    for l in (dense ? rows(method) : s + 1):-1:1
        if l == s + 1 && !dense
            for i in 1:n
                both[i] = a[i]
            end
        else
            set_time!(crew, c[l])
            multiply!(b, r.pull, bars + (l - 1) * n, points + (l - 1) * n)
            l == s + 1 && for i in 1:n
                both[i] = both[i] + a[i]
            end
        end
        from, by = method.a.from[l], method.a.by[l]
        for i in 1:n
            start[i] = start[i] + both[i]
            part = dt * both[i]
            for j in eachindex(from)
                at = (from[j] - 1) * n + i
                bars[at] = muladd(part, @inbounds(by[j]), bars[at])
            end
        end
    end
    return go_back!(b)
end

"""
With W k[i] = r[i], where W = 1 / (γ dt) - J: of a cotangent k̄ of k[i] that of r[i] is W⁻ᵀ k̄, and that of J is the product
of both, r̄ k[i]ᵀ. J and ∂f/∂t are themselves functions of the start, which is what `bend` differentiates.
"""
function pull_step!(b::Back{T, Rosenbrock{T}}, r::PullRequest, dense) where {T}
    (; crew, method) = b.again
    n, bent = crew.n, fill!(b.bent, zero(T))
    bars, points, k, a, start = numbers(b.bars), numbers(b.again.points), numbers(crew.k), numbers(b.a), numbers(b.by_start)
    by_J = numbers(bent)
    by_rate = by_J + n * n
    dt = steps_of(crew)
    dt = ifelse(dt == zero(T), one(T), dt)
    inverse = one(T) / dt
    add_products!(bars, a, one(T), method.b.from[1], method.b.by[1], n)
    for i in 1:n
        start[i] = start[i] + a[i]
    end
    for l in (method.s):-1:1
        bar = bars + (l - 1) * n
        solve_transposed!(bar, numbers(method.W), numbers(method.swapped), n)
        for i in 1:n
            for j in 1:n
                at = i + (j - 1) * n
                by_J[at] = muladd(bar[i], k[(l - 1) * n + j], by_J[at])
            end
            by_rate[i] = muladd(dt * method.gammas[l], bar[i], by_rate[i])
        end
        set_time!(crew, method.c[l])
        both = multiply!(b, r.pull, bar, points + (l - 1) * n)
        for i in 1:n
            start[i] = start[i] + both[i]
        end
        add_products!(bars, both, one(T), method.a.from[l], method.a.by[l], n)
        add_products!(bars, bar, inverse, method.d.from[l], method.d.by[l], n)
    end
    set_time!(crew, 0.0)
    both = multiply!(b, r.bend, by_J, numbers(crew.u))
    for i in 1:n
        start[i] = start[i] + both[i]
    end
    return go_back!(b)
end

"bars[j] += scale x by[j] over the stages `from`."
function add_products!(bars::PackNumbers{T}, x, scale, from, by, n) where {T}
    for j in eachindex(from), i in 1:n
        at = (from[j] - 1) * n + i
        bars[at] = muladd(x[i] * scale, @inbounds(by[j]), bars[at])
    end
    return nothing
end

"""
    interpolate!(swept, times, out)

The states of all systems at other times, (times, 1 or count), from the dense output, to `out`, (n, count, times). Beyond
its first and last steps a system is continued as these are; of one that made no steps nothing is written.
"""
function interpolate!(swept::Swept{T}, times::Matrix{Float64}, out::Array{T, 3}; of::F = dense!) where {T, F}
    for (part, track) in zip(swept.parts, swept.tracks)
        again = Rerun(swept, track)
        asked = asked_of(track, part, times)
        GC.@preserve again for same in split_by(first, asked)
            load!(Returns(nothing), again, same[1][1])
            step_again!(again, true)
            for (_, w, i, k) in same
                theta = (times[k, size(times, 2) == 1 ? 1 : i] - again.crew.t[w]) / again.crew.dt[w]
                of(view(out, :, i, k), again.crew, again.method, w, theta)
            end
        end
    end
    return nothing
end

"The block and lane of the step in which each time of each system lies: (block, lane, system, number of the time), sorted."
function asked_of(track::Track, part, times)
    steps = [Tuple{Float64, Int, Int}[] for _ in part]  # of each system, in their order: start, block and lane
    backward = false
    for j in 1:(track.blocks)
        chunk, before = place_of(track, j)
        for w in 1:WIDTH
            i = Int(chunk.systems[before * WIDTH + w])
            i == 0 && continue
            backward = chunk.steps[before * WIDTH + w] < 0
            push!(steps[i - first(part) + 1], (chunk.times[before * WIDTH + w], j, w))
        end
    end
    asked = NTuple{4, Int}[]
    for (i, own) in zip(part, steps), k in axes(times, 1)
        isempty(own) && continue
        time = times[k, size(times, 2) == 1 ? 1 : i]
        at = searchsortedlast(own, (time, 0, 0); by = first, rev = backward)
        _, j, w = own[max(at, 1)]
        push!(asked, (j, w, i, k))
    end
    return sort!(asked)
end

"Runs of neighbours for which f is the same."
function split_by(f, xs)
    ends = [j for j in eachindex(xs) if j == lastindex(xs) || f(xs[j]) != f(xs[j + 1])]
    return [view(xs, (m == 1 ? 1 : ends[m - 1] + 1):ends[m]) for m in eachindex(ends)]
end

# The event of each system of a sweep: where the first of its event functions crosses zero. Within a step it is looked for at
# a few points, and then between two of these.

"The event functions are looked at so many times within a step."
const LOOKS = 4

"The event functions of all lanes, to `w.out`, where these are `part` of their steps further and in the states y."
function evaluate!(w::Watch{T}, crew::Crew{T}, part, y::Ptr{T}) where {T}
    copyto!(w.crew.t, crew.t)
    copyto!(w.crew.dt, crew.dt)
    set_time!(w.crew, part)
    GC.@preserve w packed(w.f, w.crew, pointer(w.out), y, y)
    return nothing
end

"Lane v has a new system, i."
function begin_watch!(w::Watch, crew::Crew, v, i)
    hold!(w.crew, v, w.places, view(w.values, :, i))
    GC.@preserve crew evaluate!(w, crew, 0.0, pointer(crew.u))
    for j in axes(w.signs, 1)
        value = w.out[at_lane(j, v)]
        w.margins[j, 1, i] = value
        w.signs[j, v] = isnan(value) ? 0.0 : sign(Float64(value))
    end
    return nothing
end

"By how much the functions of lane v, as last evaluated, have the signs that they had first; a zero has none yet."
function margin(w::Watch, v)
    least = Inf
    for j in axes(w.signs, 1)
        value = Float64(w.out[at_lane(j, v)])
        isnan(value) && return NaN
        w.signs[j, v] == 0 && (w.signs[j, v] = sign(value))
        w.signs[j, v] == 0 || (least = min(least, w.signs[j, v] * value))
    end
    return least
end

"After a step: the lanes whose system met its event in it have its time, and the state there."
function look!(m::March{T}, f, method) where {T}
    (; crew, moved) = m
    w = m.watch::Watch{T}
    fill!(w.met, 0)
    rows(method) == filled(method) || complete!(crew, f, method, m.points)
    for v in 1:WIDTH
        w.before[v], w.good[v] = 0.0, NaN
    end
    for i in 1:LOOKS
        part = i / LOOKS
        i < LOOKS && state_at!(numbers(m.points), crew, method, part)
        GC.@preserve m evaluate!(w, crew, part, pointer(i < LOOKS ? m.points : crew.y))
        for v in 1:WIDTH
            moved[v] == 1 && w.met[v] == 0 || continue
            here = margin(w, v)
            if isnan(here)
                w.met[v] = -1
            elseif here <= 0
                w.met[v] = 1
                keep!(m, w, method, v, crossing(m, w, method, v, part, here))
                # What is evaluated for one lane takes the place of what was for all.
                state_again = i < LOOKS
                state_again && state_at!(numbers(m.points), crew, method, part)
                GC.@preserve m evaluate!(w, crew, part, pointer(state_again ? m.points : crew.y))
            end
            w.before[v], w.good[v] = part, isfinite(here) ? here : NaN
        end
    end
    return nothing
end

"The states of all lanes at one part of their steps."
function state_at!(y::PackNumbers{T}, crew::Crew{T}, method, part) where {T}
    n, u, k, by = crew.n, numbers(crew.u), numbers(crew.k), unit(method, steps_of(crew))
    for i in 1:n
        y[i] = u[i]
    end
    for l in 1:rows(method)
        weight = T(part * evalpoly(part, polynomial(method, l)))
        iszero(weight) && continue
        for i in 1:n
            y[i] = muladd(by * weight, k[(l - 1) * n + i], y[i])
        end
    end
    return nothing
end

"The margin of lane v alone."
function margin_at(m::March{T}, w::Watch{T}, method, v, part) where {T}
    dense!(m.point, m.crew, method, v, part)
    fill_lane!(w.point, v, m.point)
    GC.@preserve w evaluate!(w, m.crew, part, pointer(w.point))
    return margin(w, v)
end

"""
Where in the step the margin of lane v falls to zero, between `before`, where it is positive, and b, where it is `gb`, which
is not: secants, guarded by bisection (the Illinois algorithm). The last point that is known to lie before the crossing.
"""
function crossing(m::March, w::Watch, method, v, b, gb)
    t, dt = m.crew.t[v], m.crew.dt[v]
    at(part) = margin_at(m, w, method, v, part)
    finest = 2 * eps(max(abs(t), abs(t + dt))) / abs(dt)
    a, ga = w.before[v], w.good[v]
    if isnan(ga)  # it is not known there
        ga = at(a)
        if !(ga > 0)  # zero at the start, as after a bounce: it rises from there, and has fallen again by b
            part = a + (b - a) / 2
            while b - a > finest && (here = at(part)) <= 0
                b, gb, part = part, here, a + (part - a) / 2
            end
            b - a > finest || return a
            a, ga = part, at(part)
        end
    end
    wa = wb = 1.0
    for i in 1:200
        b - a <= finest && break
        part = i % 4 == 0 ? a + (b - a) / 2 : a + (b - a) * (wa * ga / (wa * ga - wb * gb))
        a + finest / 2 < part < b - finest / 2 || (part = clamp(part, a + finest / 2, b - finest / 2))
        a < part < b || break
        here = at(part)
        if here > 0
            a, ga, wa, wb = part, here, 1.0, wb / 2
        else
            b, gb, wb, wa = part, here, 1.0, wa / 2
        end
    end
    return a
end

"Lane v has its event so far in the step."
function keep!(m::March{T}, w::Watch{T}, method, v, part) where {T}
    (; crew, states, swept) = m
    i = m.lanes[v].system
    margin_at(m, w, method, v, part)
    for j in axes(w.signs, 1)
        w.margins[j, 2, i] = w.out[at_lane(j, v)]
    end
    w.times[i] = swept.times[2, i] = crew.t[v] + part * crew.dt[v]
    states[:, i, 2] = m.point
    slope!(view(w.slopes, :, i), crew, method, v, part)
    return nothing
end

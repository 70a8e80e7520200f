# The states of some of the steps of a solve, for those between to be taken again.

"The state after `i` steps."
struct Point{V}
    i::Int
    y::V
    level::Float64
end

"""
The states of O(log steps) of the steps. Where they are kept is decided as the solve goes: Wang, Moin & Iaccarino, Minimal
repetition dynamic checkpointing algorithm for unsteady adjoint calculation, SIAM J. Sci. Comput. 31 (2009) 2549-2567,
Algorithm 1.

  - `shared`: as many of the first points are also another's, who still needs their states.
"""
mutable struct Checkpoints{V}
    const points::Vector{Point{V}}
    shared::Int
end
Checkpoints{V}() where {V} = Checkpoints{V}(Point{V}[], 0)

"The same, to be used up."
used(c::Checkpoints{V}) where {V} = Checkpoints{V}(copy(c.points), length(c.points))
used(::Nothing) = nothing
"None of a solve like another."
like(::Checkpoints{V}) where {V} = Checkpoints{V}()
like(::Nothing) = nothing

"How many states are kept of so many steps: with these 1.7 steps are taken again for each of 1000, and 1.9 of 30 000."
slots(steps) = 4 + 4 * (8sizeof(steps) - leading_zeros(steps))

"Keep the state after `i` steps, in place of another one where there is no `room`."
function place!(c::Checkpoints, i, y, room)
    (; points) = c
    level, to = i == 0 ? Inf : 0.0, nothing
    if length(points) >= room
        k = dispensable(points)
        if k == 0
            k = length(points)
            level = points[k].level + 1
        end
        to = remove!(c, k)
    end
    push!(points, Point(i, to === nothing ? copy(y) : copyto!(to, y), level))
    return nothing
end

"The last point that a later one of a higher level makes dispensable; 0 if there is none."
function dispensable(points)
    highest = 0.0
    for k in length(points):-1:2
        points[k].level < highest && return k
        highest = max(highest, points[k].level)
    end
    return 0
end

"Room for a state, that of point `k`, if nobody else needs it."
function remove!(c::Checkpoints, k)
    y = c.points[k].y
    deleteat!(c.points, k)
    k > c.shared && return y
    c.shared -= 1
    return nothing
end

"The last state, which is kept no more."
function pop_last!(c::Checkpoints)
    y = c.points[end].y
    remove!(c, length(c.points))
    return y
end

# What Python will call, compiled ahead for both precisions: loading the package is then all that a first solve waits for.

# A linear field in plain C calling convention, in both precisions, as Python's callbacks are.
for T in (Float32, Float64)
    @eval begin
        function c_field(du::Ptr{$T}, u::Ptr{$T}, t::Cdouble)
            unsafe_store!(du, -unsafe_load(u))
            return Cint(0)
        end
        function c_vjp(out::Ptr{$T}, v::Ptr{$T}, u::Ptr{$T}, t::Cdouble)
            unsafe_store!(out, -unsafe_load(v))
            return Cint(0)
        end
        function c_margin(margin::Ptr{Cdouble}, u::Ptr{$T}, t::Cdouble)
            unsafe_store!(margin, Cdouble(unsafe_load(u)) - 0.5)
            return Cint(0)
        end
        function linear_field(::Type{$T}; event::Bool = false, products::Bool = false, jacobian::Bool = false)
            f = @cfunction(c_field, Cint, (Ptr{$T}, Ptr{$T}, Cdouble))
            # The Jacobian of -u is -1, and what multiplies -1 by a vector does so at v = 1.
            vjp = @cfunction(c_vjp, Cint, (Ptr{$T}, Ptr{$T}, Ptr{$T}, Cdouble))
            jac = @cfunction(c_jacobian, Cint, (Ptr{$T}, Ptr{$T}, Cdouble))
            tgrad = @cfunction(c_zero, Cint, (Ptr{$T}, Ptr{$T}, Cdouble))
            margin = @cfunction(c_margin, Cint, (Ptr{Cdouble}, Ptr{$T}, Cdouble))
            null = C_NULL
            return Field{$T}(
                1; f, jac = jacobian ? jac : null, tgrad = jacobian ? tgrad : null, vjp = products ? vjp : null,
                vjp_p = products ? vjp : null, event = event ? margin : null
            )
        end
        c_jacobian(J::Ptr{$T}, u::Ptr{$T}, t::Cdouble) = (unsafe_store!(J, -one($T)); Cint(0))
        c_zero(dT::Ptr{$T}, u::Ptr{$T}, t::Cdouble) = (unsafe_store!(dT, zero($T)); Cint(0))
    end
end

borrowed(a::Vector{T}) where {T} = Borrowed{T}(a, nothing)

"Solve u' = -u, u(0) = 1 over [0, 1] with a field as Python's would be."
function solve_linear(::Type{T}, alg; dense::Bool = false, kwargs...) where {T}
    field = linear_field(T; products = dense, kwargs...)
    times, out = [0.0, 0.5, 1.0], zeros(T, 3)
    field.event == C_NULL || (times = [0.0, 1.0]; out = zeros(T, 2))
    s, outcome = solve(
        field, alg, borrowed(ones(T, 1)), borrowed(times), borrowed(out), borrowed([0, 1]);
        rtol = 1.0e-4, atol = 1.0e-6, parameters = dense ? 1 : 0, stops = borrowed(Float64[]),
        jumps = borrowed(Float64[]), dense
    )
    return s, outcome, times, out
end

@setup_workload begin
    @compile_workload begin
        for text in ("DP5()", "Tsit5()"), T in (Float32, Float64)
            alg = algorithm(text)
            solve_linear(T, alg)
            solve_linear(T, alg; dense = true)
            solve_linear(T, alg; event = true)
        end
        for text in ("Vern7()", "Rodas5P()", "FBDF()")
            alg = algorithm(text)
            solve_linear(Float64, alg; jacobian = true)
        end
    end
end
